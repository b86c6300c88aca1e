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
from utnetv2_fast.ops.depthwise_separable_conv import fuses

OPERATOR = depthwise_separable_conv


# (B, C, *spatial), kernel, C_out. Channels, channels out, rows and columns in several blocks, and a rest of each.
FUSED_CASES: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((2, 6, 7, 9), (3, 1), 10),
    ((1, 70, 3, 10, 11), (1, 3, 3), 40),
    ((1, 3, 2, 1, 1), (1, 3, 3), 1),
    ((1, 5, 4, 3, 3), (3, 3, 3), 300),
    ((0, 3, 4, 5), (3, 3), 2),
]


def formula(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    padding = [k // 2 for k in depthwise_weight.shape[2:]]
    return convolution(convolution(x, depthwise_weight, padding=padding, groups=x.shape[1]), pointwise_weight)


def memory_format(axes: int) -> torch.memory_format:
    return torch.channels_last if axes == 2 else torch.channels_last_3d


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=memory_format(x.ndim - 2))


def sliced(x: Tensor) -> Tensor:
    """Half of the channels of a larger channels-last tensor."""
    return channels_last(torch.cat((torch.full_like(x, torch.nan), x), 1))[:, x.shape[1] :]


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


@pytest.mark.parametrize("relu", [True, False, None], ids=["scale-shift-relu", "scale-shift", "plain"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_fused_results_match_float64(
    case: tuple[tuple[int, ...], tuple[int, ...], int],
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
    relu: bool | None,
    skip_refused: Callable[[str], str],
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    skip_refused("triton")
    shape, kernel, c_out = case
    x = layout(torch.randn(shape, dtype=dtype, device=device))
    depthwise_weight = torch.randn(shape[1], 1, *kernel, dtype=dtype, device=device)
    pointwise_weight = torch.randn(c_out, shape[1], *[1] * len(kernel), dtype=dtype, device=device)
    scale, shift = torch.randn(2, *shape[:2], device=device)

    def expected(dtype: torch.dtype) -> Tensor:
        y, *weights = (t.to(dtype) for t in (x, depthwise_weight, pointwise_weight))
        if relu is not None:
            over = (slice(None), slice(None), *[None] * len(kernel))
            y = y * scale.to(dtype)[over] + shift.to(dtype)[over]
        return formula(y.relu() if relu else y, *weights)

    ops = torch.ops.utnetv2_fast
    if relu is None:
        result = ops.depthwise_separable_conv(x, depthwise_weight, pointwise_weight)
    else:
        result = ops.scaled_depthwise_separable_conv(x, scale, shift, relu, depthwise_weight, pointwise_weight)
    assert_accurate(result, expected(dtype), expected(torch.float64), factor=3.0)
    assert result.is_contiguous(
        memory_format=memory_format(len(kernel)) if x.stride(1) == 1 else torch.contiguous_format
    )


def test_fused_gradients_match_float64(
    skip_refused: Callable[[str], str], device: torch.device, assert_accurate: Callable[..., None]
) -> None:
    impl = skip_refused("triton")
    inputs = make_inputs(7, 9, dtype=torch.float16, device=device)
    inputs = tuple(channels_last(t.detach()).requires_grad_() for t in inputs)
    assert fuses(*inputs)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    result, eager, exact = depthwise_separable_conv(*inputs, impl=impl), formula(*inputs), formula(*exact_inputs)
    assert_accurate(result, eager, exact)
    grad = torch.randn_like(result)
    gradients = torch.autograd.grad(result, inputs, grad)
    eager_gradients = torch.autograd.grad(eager, inputs, grad)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.double())
    for r, e, x in zip(gradients, eager_gradients, exact_gradients, strict=True):
        assert_accurate(r, e, x, factor=3.0)


def test_one_kernel_where_it_wins() -> None:
    x, few, many = torch.empty(1, 32, 4, 6, 5), torch.empty(32, 1, 1, 3, 3), torch.empty(32, 1, 3, 3, 3)
    x = channels_last(x.bfloat16())
    assert fuses(x, few, torch.empty(256, 32, 1, 1, 1))
    assert not fuses(x, few, torch.empty(257, 32, 1, 1, 1))
    assert not fuses(x, many, torch.empty(256, 32, 1, 1, 1))
    assert not fuses(x.contiguous(), few, torch.empty(256, 32, 1, 1, 1))


def test_float32_is_fused_where_tensor_cores_may_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, depthwise_weight, pointwise_weight = make_inputs(7, 9)
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert fuses(channels_last(x), depthwise_weight, pointwise_weight) == allowed


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("spatial", [(7, 9), (4, 6, 5)])
def test_opcheck(
    spatial: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
    skip_refused: Callable[[str], str],
    device: torch.device,
) -> None:
    skip_refused("triton")
    x, *weights = (t.detach() for t in make_inputs(*spatial, device=device))
    scale, shift = torch.randn(2, *x.shape[:2], device=device)
    ops = torch.ops.utnetv2_fast
    torch.library.opcheck(ops.depthwise_separable_conv.default, (layout(x), *weights))
    torch.library.opcheck(ops.scaled_depthwise_separable_conv.default, (layout(x), scale, shift, True, *weights))


@pytest.mark.parametrize("far", range(5), ids=["sample", "channel", "plane", "row", "column"])
def test_fused_offsets_beyond_2_to_the_31(
    far: int, skip_refused: Callable[[str], str], device: torch.device, assert_accurate: Callable[..., None]
) -> None:
    skip_refused("triton")
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 6 << 30:
        pytest.skip("takes 4 GiB of the GPU")
    sizes, strides = [2, 3, 3, 3, 3], [81, 1, 27, 9, 3]
    sizes[far], strides[far] = 2, 2**31 + 8
    memory = torch.empty(2**31 + 1024, dtype=torch.float16, device=device)  # 4 GiB, of which two pages are touched
    x = memory.as_strided(sizes, strides)
    x.copy_(torch.randn(sizes))
    weights = [torch.randn(s, dtype=x.dtype, device=device) for s in ((sizes[1], 1, 3, 3, 3), (4, sizes[1], 1, 1, 1))]
    result = torch.ops.utnetv2_fast.depthwise_separable_conv(x, *weights)
    exact = formula(x.double(), *(w.double() for w in weights))
    assert_accurate(result, formula(x.contiguous(), *weights), exact)


@pytest.mark.parametrize("spatial", [(4, 5), (3, 4, 3)])
def test_gradcheck(
    spatial: tuple[int, ...],
    impl: str,
    device: torch.device,
    skip_what_triton_lacks: Callable[[str, torch.dtype], None],
) -> None:
    skip_what_triton_lacks(impl, torch.float64)
    inputs = make_inputs(*spatial, dtype=torch.float64, device=device)
    assert gradcheck(functools.partial(depthwise_separable_conv, impl=impl), inputs, fast_mode=True)


def test_channels_last_stays_channels_last(impl: str, device: torch.device) -> None:
    x, *weights = make_inputs(7, 9, device=device)
    result = depthwise_separable_conv(x.to(memory_format=torch.channels_last), *weights, impl=impl)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_autocast_lowers_both_convolutions(
    impl: str, device: torch.device, skip_what_triton_lacks: Callable[[str, torch.dtype], None]
) -> None:
    skip_what_triton_lacks(impl, torch.bfloat16)
    inputs = make_inputs(4, 6, 5, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        result = depthwise_separable_conv(*inputs, impl=impl)
    assert torch.equal(result, depthwise_separable_conv(*(t.bfloat16() for t in inputs), impl=impl))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(result.sum(), inputs))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("spatial", [(7, 9), (4, 6, 5)])
def test_compiles_whole(
    spatial: tuple[int, ...], layout: Callable[[Tensor], Tensor], impl: str, device: torch.device
) -> None:
    torch._dynamo.reset()
    inputs = tuple(layout(t.detach()).requires_grad_() for t in make_inputs(*spatial, device=device))
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
