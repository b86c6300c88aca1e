"""Depthwise convolution against torch's grouped convolution in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from utnetv2_fast.ops import depthwise_conv

OPERATOR = depthwise_conv
Case = tuple[tuple[int, ...], tuple[int, ...]]  # (B, C, *spatial), kernel

CASES: list[Case] = [
    ((2, 32, 12, 9), (3, 3)),
    ((2, 5, 7, 8), (5, 1)),
    ((1, 16, 6, 10, 8), (3, 3, 3)),
    ((2, 7, 4, 9, 6), (1, 3, 3)),
    ((2, 3, 2, 5, 4), (7, 1, 5)),
    ((1, 1, 1, 1), (3, 3)),
    ((1, 1, 1, 1, 1), (5, 3, 3)),
    ((0, 3, 4, 5), (3, 3)),
    ((0, 3, 4, 5, 6), (3, 3, 3)),
]
# Channels, planes or rows that a kernel cuts into pieces, and a rest of each.
LARGER_CASES: list[Case] = [
    ((1, 41, 40, 9, 10), (3, 3, 3)),
    ((1, 2, 5, 130, 261), (3, 3, 3)),
    ((1, 11, 120, 150), (7, 5)),
]
# Of Triton, whose interpreter is slow: taps that are loaded when needed, taps split among programs, walks along D and H
# and along neither, in several chunks, channels, rows and columns in several blocks, and a rest of each.
TRITON_CASES: list[Case] = [
    ((1, 2, 3, 2, 4), (7, 3, 7)),
    ((1, 3, 2, 6, 5), (5, 5, 5)),
    ((1, 3, 9, 20), (7, 7)),
    ((1, 2, 10, 3), (19, 5)),
    ((1, 70, 3, 6, 5), (3, 3, 3)),
    ((2, 3, 37, 6), (3, 3)),
    ((1, 1, 2, 9, 70), (1, 3, 3)),
    ((1, 2, 40, 5, 3), (5, 1, 1)),
    ((1, 2, 3, 40), (1, 3)),
    ((1, 3, 5, 6), (1, 1)),
]


def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(x, weight, bias, padding=[k // 2 for k in weight.shape[2:]], groups=x.shape[1])


def contiguous(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def sliced(x: Tensor) -> Tensor:
    """Half of the channels and every other column of a larger tensor."""
    b, c, *spatial = x.shape
    larger = torch.full((b, 2 * c, *spatial[:-1], 2 * spatial[-1]), torch.nan, dtype=x.dtype, device=x.device)
    larger[:, c:, ..., 1::2] = x
    return larger[:, c:, ..., 1::2]


def permuted(x: Tensor) -> Tensor:
    """Neither channels-first nor channels-last: the batch varies fastest."""
    return x.permute(*range(1, x.ndim), 0).contiguous().permute(-1, *range(x.ndim - 1))


def broadcast(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


LAYOUTS = [contiguous, channels_last, sliced, permuted, broadcast]
Layout = Callable[[Tensor], Tensor]


def make_inputs(
    case: Case, layout: Layout = contiguous, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    (b, c, *spatial), kernel = case
    x = layout(torch.randn(b, c, *spatial, dtype=dtype, device=device)).requires_grad_()
    weight = torch.randn(c, 1, *kernel, dtype=dtype, device=device, requires_grad=True)
    return x, weight, torch.randn(c, dtype=dtype, device=device, requires_grad=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_gradients_match_float64(
    case: Case,
    dtype: torch.dtype,
    layout: Layout,
    build: str,
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    check_accuracy(make_inputs(case, layout, dtype, device), layout, build, assert_accurate)


@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGER_CASES, ids=str)
def test_larger_results_and_gradients_match_float64(
    case: Case,
    dtype: torch.dtype,
    layout: Layout,
    compiled_build: str,
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    check_accuracy(make_inputs(case, layout, dtype, device), layout, compiled_build, assert_accurate)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_triton_results_and_gradients_match_float64(
    case: Case,
    dtype: torch.dtype,
    layout: Layout,
    skip_refused: Callable[[str], str],
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    check_accuracy(make_inputs(case, layout, dtype, device), layout, skip_refused("triton"), assert_accurate)


def check_accuracy(inputs: tuple[Tensor, ...], layout: Layout, impl: str, assert_accurate: Callable[..., None]) -> None:
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    result, eager, exact = depthwise_conv(*inputs, impl=impl), formula(*inputs), formula(*exact_inputs)
    assert_accurate(result, eager, exact)
    grad = layout(torch.randn_like(result, memory_format=torch.contiguous_format))
    gradients = torch.autograd.grad(result, inputs, grad)
    eager_gradients = torch.autograd.grad(eager, inputs, grad)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.double())
    for r, e, x in zip(gradients, eager_gradients, exact_gradients, strict=True):
        assert_accurate(r, e, x, factor=3.0)


odd = st.sampled_from([1, 3, 5])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    axes=st.lists(st.tuples(st.integers(1, 7), odd), min_size=2, max_size=3),
    b=st.integers(1, 3),
    c=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_in_any_layout(
    axes: list[tuple[int, int]], b: int, c: int, layout: Layout, impl: str, device: torch.device
) -> None:
    spatial, kernel = zip(*axes, strict=True)
    x, weight, _ = make_inputs(((b, c, *spatial), kernel), layout, device=device)
    result, exact = depthwise_conv(x, weight, impl=impl), formula(x.double(), weight.double(), None)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-4)
    grad = torch.randn_like(x)
    gradients = torch.autograd.grad(result, (x, weight), grad)
    for got, want in zip(gradients, torch.autograd.grad(exact, (x, weight), grad.double()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", [((2, 3, 4, 5), (3, 5)), ((2, 2, 3, 4, 3), (3, 1, 3))], ids=str)
def test_gradcheck(
    case: Case,
    with_bias: bool,
    layout: Layout,
    build: str,
    device: torch.device,
    skip_what_triton_lacks: Callable[[str, torch.dtype], None],
) -> None:
    skip_what_triton_lacks(build, torch.float64)
    inputs = make_inputs(case, layout, torch.float64, device)
    assert gradcheck(functools.partial(depthwise_conv, impl=build), inputs if with_bias else inputs[:2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [((2, 4, 6, 5), (3, 3)), ((2, 4, 3, 6, 5), (3, 3, 3))], ids=str)
def test_result_keeps_the_layout_of_its_input(case: Case, layout: Layout, impl: str, device: torch.device) -> None:
    x, weight, bias = make_inputs(case, layout, device=device)
    result = depthwise_conv(x, weight, bias, impl=impl)
    assert result.stride() == torch.empty_like(x).stride()
    grad_x, grad_weight = torch.autograd.grad(result, (x, weight), torch.ones_like(result))
    assert grad_x.stride() == result.stride()
    assert grad_weight.stride() == weight.stride()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_cost_nothing_and_change_nothing(frozen: int, impl: str, device: torch.device) -> None:
    inputs = make_inputs(((2, 4, 3, 6, 5), (3, 3, 3)), device=device)
    expected = torch.autograd.grad(depthwise_conv(*inputs, impl=impl).sum(), inputs)
    inputs[frozen].requires_grad_(False)
    depthwise_conv(*inputs, impl=impl).sum().backward()
    for index, (tensor, want) in enumerate(zip(inputs, expected, strict=True)):
        assert tensor.grad is None if index == frozen else torch.equal(tensor.grad, want)


def test_repeats_are_bit_identical(impl: str, device: torch.device) -> None:
    inputs = make_inputs(((2, 16, 8, 12, 12), (3, 3, 3)), device=device)
    run = results_and_gradients(inputs, impl)
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("far", range(5), ids=["sample", "channel", "plane", "row", "column"])
def test_offsets_beyond_2_to_the_31(
    far: int, impl: str, device: torch.device, assert_accurate: Callable[..., None]
) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 6 << 30:
        pytest.skip("takes 4 GiB of the GPU")
    sizes, strides = [2, 3, 3, 3, 3], [81, 1, 27, 9, 3]
    sizes[far], strides[far] = 2, 2**31 + 8
    memory = torch.empty(2**31 + 1024, dtype=torch.float16, device=device)  # 4 GiB, of which two pages are touched
    x, grad = memory.as_strided(sizes, strides), memory.as_strided(sizes, strides, 512)
    for tensor in (x, grad):
        tensor.copy_(torch.randn(sizes))
    weight = torch.randn(sizes[1], 1, 3, 3, 3, dtype=x.dtype, device=device)

    def results(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, grad = inputs
        leaves = (x.detach().requires_grad_(), weight.detach().requires_grad_())
        result = function(*leaves, None)
        return result.detach(), *torch.autograd.grad(result, leaves, grad)

    ours = results(functools.partial(depthwise_conv, impl=impl), x, weight, grad)
    eager = results(formula, x.contiguous(), weight, grad.contiguous())
    exact = results(formula, x.double(), weight.double(), grad.double())
    for r, e, x in zip(ours, eager, exact, strict=True):
        assert_accurate(r, e, x, factor=3.0)


@pytest.mark.parametrize("layout", [contiguous, channels_last, permuted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGER_CASES, ids=str)
def test_the_number_of_threads_changes_no_bit(
    case: Case,
    dtype: torch.dtype,
    layout: Layout,
    compiled: str,
    device: torch.device,
    assert_same_bits_on_any_threads: Callable[..., None],
) -> None:
    inputs = make_inputs(case, layout, dtype, device)[:2]  # the bias's gradient is a sum that torch cuts by its threads
    assert_same_bits_on_any_threads(results_and_gradients(inputs, compiled))


def results_and_gradients(inputs: tuple[Tensor, ...], impl: str) -> Callable[[], list[Tensor]]:
    grad = torch.randn_like(inputs[0])

    def run() -> list[Tensor]:
        result = depthwise_conv(*inputs, impl=impl)
        return [result, *torch.autograd.grad(result, inputs, grad)]

    return run


@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_read_and_rounded_like_torch(
    dtype: torch.dtype, layout: Layout, build: str, device: torch.device
) -> None:
    """Every number of 16 bits, times weights that reach ties, subnormals and infinity: the products are exact."""
    if build == "reference":
        pytest.skip("torch's own convolution, which takes subnormals for zero where a processor multiplies bfloat16")
    numbers = torch.arange(2**16, device=device).to(torch.uint16).view(dtype)
    eps = torch.finfo(dtype).eps
    for factor in (1.0, 1 + eps, 1.5, 3 * eps, eps / 2, 2.0**-14 + 2.0**-16, 2.0**4, torch.inf):
        for channels in (4, 64):  # less than a vector of them, and several
            x = layout(numbers.view(1, channels, 64, -1))
            weight = torch.full((channels, 1, 1, 1), factor, dtype=dtype, device=device)
            expected = (x.float() * weight.float().view(1, -1, 1, 1)).to(dtype)
            torch.testing.assert_close(depthwise_conv(x, weight, impl=build), expected, rtol=0, atol=0, equal_nan=True)


def test_bfloat16_is_read_as_it_is(device: torch.device, skip_refused: Callable[[str], str]) -> None:
    """By its bits, as far as the interpreter can show it: it rounds bfloat16 its own way, but torch rounds this sum."""
    impl = skip_refused("triton")
    x, weight, _ = (t.detach() for t in make_inputs(((2, 5, 6, 7), (3, 3)), channels_last, torch.bfloat16, device))
    inputs = (torch.randn_like(x), x, weight)
    backward_weight = torch.ops.utnetv2_fast.depthwise_conv_backward_weight
    exact = backward_weight(*(t.double() for t in inputs), "reference")
    torch.testing.assert_close(backward_weight(*inputs, impl).double(), exact, rtol=2**-8, atol=1e-5)


def test_autocast_lowers_like_torch(
    impl: str, device: torch.device, skip_what_triton_lacks: Callable[[str, torch.dtype], None]
) -> None:
    skip_what_triton_lacks(impl, torch.bfloat16)
    inputs = make_inputs(((2, 8, 6, 10, 8), (3, 3, 3)), device=device)
    lowered = tuple(t.detach().bfloat16().requires_grad_() for t in inputs)
    with torch.autocast(device.type, torch.bfloat16):
        result = depthwise_conv(*inputs, impl=impl)
        assert result.dtype == formula(*inputs).dtype
        gradients = torch.autograd.grad(result, inputs, torch.ones_like(result))
    expected = depthwise_conv(*lowered, impl=impl)
    assert torch.equal(result, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, lowered, torch.ones_like(expected)), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [((2, 4, 6, 5), (3, 3)), ((2, 4, 3, 6, 5), (1, 3, 3))], ids=str)
def test_opcheck(case: Case, layout: Layout, impl: str, device: torch.device) -> None:
    ops = torch.ops.utnetv2_fast
    x, weight, bias = (t.detach() for t in make_inputs(case, layout, device=device))
    grad = torch.randn_like(x)
    torch.library.opcheck(ops.depthwise_conv.default, (x, weight, bias, impl))
    torch.library.opcheck(ops.depthwise_conv.default, (x, weight, None, impl))
    torch.library.opcheck(ops.depthwise_conv_backward_weight.default, (grad, x, weight, impl))
    scale, shift = torch.randn(2, 4, device=device), torch.randn(2, 4, device=device)
    torch.library.opcheck(ops.scaled_depthwise_conv.default, (x, scale, shift, True, weight, impl))
    torch.library.opcheck(
        ops.scaled_depthwise_conv_backward_weight.default, (grad, x, scale, shift, True, weight, impl)
    )


@pytest.mark.parametrize("dimensions", [2, 3])
def test_compiles_whole_with_any_size(dimensions: int, impl: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_conv(depthwise_conv(x, weight, bias, impl=impl), weight, impl=impl).sin().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 8, 11):
        case = ((2, 4, *[size] * dimensions), (3,) * dimensions)
        inputs = make_inputs(case, channels_last, device=device)
        loss, expected = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize(
    ("name", "x", "weight", "bias"),
    [
        ("x", (2, 4, 6), (4, 1, 3), (4,)),
        ("x", (2, 0, 6, 6), (0, 1, 3, 3), (0,)),
        ("x", (2, 4, 0, 6), (4, 1, 3, 3), (4,)),
        ("weight", (2, 4, 6, 6), (4, 1, 3), (4,)),
        ("weight", (2, 4, 6, 6), (3, 1, 3, 3), (4,)),
        ("weight", (2, 4, 6, 6), (4, 4, 3, 3), (4,)),
        ("weight", (2, 4, 6, 6), (4, 1, 3, 2), (4,)),
        ("weight", (2, 4, 6, 6), (4, 1, 3, 0), (4,)),
        ("bias", (2, 4, 6, 6), (4, 1, 3, 3), (1,)),
        ("bias", (2, 4, 6, 6), (4, 1, 3, 3), (4, 1)),
    ],
)
def test_wrong_shapes_are_named(name: str, x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must "):
        depthwise_conv(torch.zeros(x), torch.zeros(weight), torch.zeros(bias))


def test_mixed_dtypes_and_devices_are_named() -> None:
    x, weight, bias = (t.detach() for t in make_inputs(((2, 4, 6, 5), (3, 3))))
    with pytest.raises(ValueError, match=r"^weight must have the dtype of x, torch.float32, not torch.float64"):
        depthwise_conv(x, weight.double(), bias)
    with pytest.raises(ValueError, match=r"^bias must be on the device of x, cpu, not meta"):
        depthwise_conv(x, weight, bias.to("meta"))
    with pytest.raises(ValueError, match=r"^x must be float32, float16, bfloat16 or float64, not torch.int32"):
        depthwise_conv(x.int(), weight.int())


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [((2, 19, 4, 9, 11), (3, 3, 3)), ((2, 7, 12, 9), (3, 5))], ids=str)
def test_a_scale_shift_and_relu_in_front_match_float64(
    case: Case,
    dtype: torch.dtype,
    layout: Layout,
    relu: bool,
    impl: str,
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    x, weight, _ = (t.detach() for t in make_inputs(case, layout, dtype, device))
    shape = x.shape[:2]
    scale, shift = (torch.randn(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)) for _ in "ab")
    grad = layout(torch.randn_like(x, memory_format=torch.contiguous_format))
    ops = torch.ops.utnetv2_fast

    def results(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        over = (slice(None), slice(None), *[None] * (x.ndim - 2))
        y = x.to(dtype) * scale.to(dtype)[over] + shift.to(dtype)[over]
        kernel = weight.to(dtype).requires_grad_()
        result = formula(y.relu() if relu else y, kernel, None)
        return result.detach(), torch.autograd.grad(result, kernel, grad.to(dtype))[0]

    ours = (
        ops.scaled_depthwise_conv(x, scale, shift, relu, weight, impl),
        ops.scaled_depthwise_conv_backward_weight(grad, x, scale, shift, relu, weight, impl),
    )
    for result, eager, exact in zip(ours, results(dtype), results(torch.float64), strict=True):
        assert_accurate(result, eager, exact, factor=3.0)
