"""Operation counts of the operators equal those torch counts for the same formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import utnetv2_fast.ops.flops  # noqa: F401
from utnetv2_fast.ops import bidirectional_attention, dense_conv, depthwise_conv


def test_attention_counts_the_products_it_does() -> None:
    b, h, n, l, d = 2, 3, 40, 9, 8
    q, v = (torch.randn(b, h, n, d, requires_grad=True) for _ in range(2))
    maps = [torch.randn(b, h, l, d, requires_grad=True) for _ in range(2)]
    one = 2 * b * h * n * l * d
    for need_map, forward, both in ((True, 3, 10), (False, 2, 7)):
        with FlopCounterMode(display=False) as counter:
            results = [r for r in bidirectional_attention(q, v, *maps, need_map=need_map) if r is not None]
            assert counter.get_total_flops() == forward * one
            torch.autograd.backward(results, [torch.ones_like(r) for r in results])
        assert counter.get_total_flops() == both * one


def test_depthwise_conv_counts_every_tap_of_every_voxel() -> None:
    x, weight = torch.randn(2, 4, 6, 8, 8, requires_grad=True), torch.randn(4, 1, 3, 1, 3, requires_grad=True)
    with FlopCounterMode(display=False) as torchs:
        torch.nn.functional.conv3d(x, weight, padding=(1, 0, 1), groups=4)
    with FlopCounterMode(display=False) as counter:
        result = depthwise_conv(x, weight)
        assert counter.get_total_flops() == torchs.get_total_flops()
        result.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 9


@pytest.mark.parametrize("scaled", [False, True])
def test_depthwise_separable_conv_counts_both_convolutions(scaled: bool) -> None:
    x, depthwise_weight = torch.randn(2, 4, 6, 8, device="meta"), torch.randn(4, 1, 3, 5, device="meta")
    pointwise_weight, moments = torch.randn(7, 4, 1, 1, device="meta"), torch.randn(2, 4, device="meta")
    with FlopCounterMode(display=False) as torchs:
        between = torch.nn.functional.conv2d(x, depthwise_weight, padding=(1, 2), groups=4)
        torch.nn.functional.conv2d(between, pointwise_weight)
    ops = torch.ops.utnetv2_fast
    with FlopCounterMode(display=False) as counter:
        if scaled:
            ops.scaled_depthwise_separable_conv(x, moments, moments, True, depthwise_weight, pointwise_weight)
        else:
            ops.depthwise_separable_conv(x, depthwise_weight, pointwise_weight)
    assert counter.get_total_flops() == torchs.get_total_flops()


def test_dense_conv_counts_every_tap_of_every_channel() -> None:
    """Not the fewer products that Winograd's filtering takes: counts compare networks."""
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    x = torch.randn(2, 6, 8, 16).movedim(-1, 1).requires_grad_()
    with FlopCounterMode(display=False) as torchs:
        torch.nn.functional.conv2d(x, weight, padding=1)
    with FlopCounterMode(display=False) as counter:
        result = dense_conv(x, weight)
        assert counter.get_total_flops() == torchs.get_total_flops()
        result.sum().backward()
    assert counter.get_total_flops() == 3 * torchs.get_total_flops()
