"""Depthwise-separable convolution against two of torch's convolutions in float64."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from utnetv2_fast.ops import depthwise_separable_conv

OPERATOR = depthwise_separable_conv


def formula(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    padding = [k // 2 for k in depthwise_weight.shape[2:]]
    return convolution(convolution(x, depthwise_weight, padding=padding, groups=x.shape[1]), pointwise_weight)


def make_inputs(
    *spatial: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, ones = (3, 1, 5)[: len(spatial)], (1,) * len(spatial)
    shapes = ((2, 6, *spatial), (6, 1, *kernel), (10, 6, *ones))
    x, depthwise_weight, pointwise_weight = (
        torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes
    )
    return x, depthwise_weight, pointwise_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("spatial", [(7, 9), (4, 6, 5)])
def test_result_and_gradients_match_float64(
    spatial: tuple[int, ...],
    dtype: torch.dtype,
    build: str,
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    inputs = make_inputs(*spatial, dtype=dtype, device=device)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    result, eager, exact = depthwise_separable_conv(*inputs, impl=build), formula(*inputs), formula(*exact_inputs)
    assert_accurate(result, eager, exact)
    grad = torch.randn_like(result)
    gradients = torch.autograd.grad(result, inputs, grad)
    eager_gradients = torch.autograd.grad(eager, inputs, grad)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.double())
    for r, e, x in zip(gradients, eager_gradients, exact_gradients, strict=True):
        assert_accurate(r, e, x, factor=3.0)


@pytest.mark.parametrize("spatial", [(4, 5), (3, 4, 3)])
def test_gradcheck(spatial: tuple[int, ...], impl: str, device: torch.device) -> None:
    inputs = make_inputs(*spatial, dtype=torch.float64, device=device)
    assert gradcheck(functools.partial(depthwise_separable_conv, impl=impl), inputs, fast_mode=True)


def test_channels_last_stays_channels_last(impl: str, device: torch.device) -> None:
    x, *weights = make_inputs(7, 9, device=device)
    result = depthwise_separable_conv(x.to(memory_format=torch.channels_last), *weights, impl=impl)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_autocast_lowers_both_convolutions(impl: str, device: torch.device) -> None:
    inputs = make_inputs(4, 6, 5, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        result = depthwise_separable_conv(*inputs, impl=impl)
    assert torch.equal(result, depthwise_separable_conv(*(t.bfloat16() for t in inputs), impl=impl))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(result.sum(), inputs))


def test_compiles_whole(impl: str, device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(4, 6, 5, device=device)
    compiled = torch.compile(depthwise_separable_conv, fullgraph=True, backend="aot_eager")
    result, expected = compiled(*inputs, impl=impl), depthwise_separable_conv(*inputs, impl=impl)
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(result.sin().sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sin().sum(), inputs))


@pytest.mark.parametrize("shape", [(10, 5, 1, 1), (10, 6, 1), (10, 6, 3, 1), (10, 6, 1, 1, 1)])
def test_wrong_pointwise_shapes_are_named(shape: tuple[int, ...]) -> None:
    x, depthwise_weight, _ = make_inputs(7, 9)
    with pytest.raises(ValueError, match=rf"^pointwise_weight must be \(C_out, C, 1, 1\) .*{re.escape(str(shape))}$"):
        depthwise_separable_conv(x, depthwise_weight, torch.zeros(shape))


def test_other_wrong_arguments_are_named() -> None:
    x, depthwise_weight, pointwise_weight = make_inputs(7, 9)
    with pytest.raises(ValueError, match=r"^weight must have odd kernel sizes, not \(2, 2\)"):
        depthwise_separable_conv(x, torch.zeros(6, 1, 2, 2), pointwise_weight)
    with pytest.raises(ValueError, match=r"^pointwise_weight must have the dtype of x"):
        depthwise_separable_conv(x, depthwise_weight, pointwise_weight.double())


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_cost_nothing_and_change_nothing(frozen: int) -> None:
    inputs = make_inputs(4, 6, 5)
    expected = torch.autograd.grad(depthwise_separable_conv(*inputs).sum(), inputs)
    inputs[frozen].requires_grad_(False)
    depthwise_separable_conv(*inputs).sum().backward()
    for index, (tensor, want) in enumerate(zip(inputs, expected, strict=True)):
        assert tensor.grad is None if index == frozen else torch.equal(tensor.grad, want)
