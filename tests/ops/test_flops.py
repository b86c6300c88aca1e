"""Operation counts of the operators equal those torch counts for the same formulas written out."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

import utnetv2_fast.ops.flops  # noqa: F401
from utnetv2_fast.ops import bidirectional_attention, depthwise_conv


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
