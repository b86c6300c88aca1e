"""Scale, shift and ReLU against their formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from utnetv2_fast.ops import scale_shift
from utnetv2_fast.ops.dispatch import Impl

OPERATOR = scale_shift
SHAPES: list[tuple[int, ...]] = [
    (2, 32, 12, 9),
    (1, 5, 7, 8),
    (2, 16, 6, 10, 8),
    (2, 19, 37, 33),
    (1, 3, 5, 40, 41),
    (2, 600, 3, 3),
    (2, 7, 11),
    (3, 4, 1, 1),
    (1, 1, 1),
    (0, 3, 4, 5),
]


def formula(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    over = (..., *[None] * (x.ndim - 2))
    y = x.to(scale.dtype) * scale[over] + shift[over]
    return (y.relu() if relu else y).to(x.dtype)


def contiguous(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x: Tensor) -> Tensor:
    """Half of the channels and every other column of a larger tensor."""
    b, c, *spatial = x.shape
    larger = torch.full((b, 2 * c, *spatial[:-1], 2 * spatial[-1]), torch.nan, dtype=x.dtype, device=x.device)
    larger[:, c:, ..., 1::2] = x
    return larger[:, c:, ..., 1::2]


def half_of_the_channels(x: Tensor) -> Tensor:
    return channels_last(torch.cat([x, torch.full_like(x, torch.nan)], dim=1)).chunk(2, 1)[0]


def permuted(x: Tensor) -> Tensor:
    """Neither channels-first nor channels-last: the batch varies fastest, the columns slowest."""
    axes = range(x.ndim - 1, -1, -1)
    return x.permute(*axes).contiguous().permute(*axes)


def broadcast(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


LAYOUTS = [contiguous, channels_last, sliced, half_of_the_channels, permuted, broadcast]
Layout = Callable[[Tensor], Tensor]


def make_inputs(
    shape: tuple[int, ...],
    layout: Layout = contiguous,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    x = layout(torch.randn(shape, dtype=dtype, device=device)).requires_grad_()
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = (torch.randn(shape[1::-1], dtype=parameter_dtype, device=device).mT for _ in range(2))
    return x, scale.requires_grad_(), shift.requires_grad_()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients_match_float64(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    relu: bool,
    impl: str,
    device: torch.device,
    skip_what_triton_lacks: Callable[[str, torch.dtype], None],
    assert_accurate: Callable[..., None],
) -> None:
    skip_what_triton_lacks(impl, dtype)
    inputs = make_inputs(shape, layout, dtype, device)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    result, eager = scale_shift(*inputs, relu=relu, impl=impl), formula(*inputs, relu)
    exact = formula(*exact_inputs, relu)
    assert_accurate(result, eager, exact)
    assert result.stride() == torch.empty_like(inputs[0]).stride()
    # Where rounding decides on which side of zero a value lies, no gradient is the right one.
    grad = layout(torch.randn_like(result, memory_format=torch.contiguous_format)) * (exact.abs() > 1e-5)
    gradients = torch.autograd.grad(result, inputs, grad)
    eager_gradients = torch.autograd.grad(eager, inputs, grad)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.double())
    for r, e, x in zip(gradients, eager_gradients, exact_gradients, strict=True):
        assert_accurate(r, e, x, factor=3.0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 3),
    c=st.integers(1, 20),
    spatial=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    relu=st.booleans(),
)
def test_any_shape_in_any_layout(
    b: int, c: int, spatial: list[int], layout: Layout, grad_layout: Layout, relu: bool, impl: str, device: torch.device
) -> None:
    if impl == "triton":  # interpreted, each tile takes milliseconds
        spatial = [1 + size % 12 for size in spatial]
    inputs = make_inputs((b, c, *spatial), layout, device=device)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    result, exact = scale_shift(*inputs, relu=relu, impl=impl), formula(*exact_inputs, relu)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5)
    grad = grad_layout(torch.randn(b, c, *spatial, device=device)) * (exact.abs() > 1e-5)
    gradients = torch.autograd.grad(result, inputs, grad)
    for got, want in zip(gradients, torch.autograd.grad(exact, exact_inputs, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 5, 3, 4, 2), (1, 2, 6)], ids=str)
def test_gradcheck(shape: tuple[int, ...], layout: Layout, relu: bool, device: torch.device) -> None:
    inputs = make_inputs(shape, layout, torch.float64, device)
    assert gradcheck(lambda *t: scale_shift(*t, relu=relu), inputs)


def test_nan_and_infinity_pass_as_through_relu(impl: str, device: torch.device) -> None:
    x = torch.tensor([[[torch.nan, torch.inf, -torch.inf, 0.0, 1.0, -1.0, -0.0, 2.0, -2.0]]], device=device)
    for values in (x, x.expand(1, 9, 9).mT):
        leaf, expected_leaf = (values.clone().requires_grad_() for _ in range(2))
        ones, zeros = torch.ones(values.shape[:2], device=device), torch.zeros(values.shape[:2], device=device)
        result, expected = scale_shift(leaf, ones, zeros, relu=True, impl=impl), expected_leaf.relu()
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        gradients = (torch.autograd.grad(r.sum(), t)[0] for r, t in ((result, leaf), (expected, expected_leaf)))
        assert torch.equal(*gradients)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_repeats_and_thread_counts_are_bit_identical(layout: Layout) -> None:
    inputs = make_inputs((2, 40, 10, 33, 29), layout)
    grad = torch.randn_like(inputs[0])

    def run() -> list[Tensor]:
        result = scale_shift(*inputs, relu=True)
        return [result, *torch.autograd.grad(result, inputs, grad)]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 4):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_repeats_are_bit_identical(layout: Layout, impl: str, device: torch.device) -> None:
    inputs = make_inputs((2, 6, 5, 33, 29), layout, device=device)  # several sums for every channel
    grad = torch.randn_like(inputs[0])

    def run() -> list[Tensor]:
        result = scale_shift(*inputs, relu=True, impl=impl)
        return [result, *torch.autograd.grad(result, inputs, grad)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
def test_offsets_beyond_two_to_the_31st(axis: int, impl: str, device: torch.device) -> None:
    size, far = 3, 2**30 + 8
    strides = [625, 125, 25, 5, 1]
    strides[axis] = far
    storage = torch.empty(2 * far + 3200, dtype=torch.float16, device=device)  # of which the view touches 486 values
    x = storage.as_strided((size,) * 5, strides).copy_(torch.randn((size,) * 5))
    grad = storage[1600:].as_strided(x.shape, strides).copy_(torch.randn((size,) * 5))
    scale, shift = torch.randn(2, size, size, device=device).unbind()
    ops = torch.ops.utnetv2_fast
    results = ops.scale_shift(x, scale, shift, True, impl), *ops.scale_shift_backward(grad, x, scale, shift, True, impl)
    near = x.contiguous()
    expected = (
        ops.scale_shift(near, scale, shift, True, "reference"),
        *ops.scale_shift_backward(grad.contiguous(), near, scale, shift, True, "reference"),
    )
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_saves_nothing_but_its_arguments(impl: str, device: torch.device) -> None:
    inputs = make_inputs((2, 4, 6, 5), device=device)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        scale_shift(*inputs, relu=True, impl=impl)
    assert sorted(saved) == sorted(t.data_ptr() for t in inputs)


def test_autocast_changes_nothing(impl: str, device: torch.device) -> None:
    inputs = make_inputs((2, 3, 4, 5), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        lowered = scale_shift(*inputs, impl=impl)
    assert torch.equal(lowered, scale_shift(*inputs, impl=impl))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(
    layout: Layout,
    dtype: torch.dtype,
    impl: str,
    device: torch.device,
    skip_what_triton_lacks: Callable[[str, torch.dtype], None],
) -> None:
    skip_what_triton_lacks(impl, dtype)
    ops = torch.ops.utnetv2_fast
    inputs = tuple(t.detach() for t in make_inputs((2, 4, 3, 6, 5), layout, dtype, device))
    torch.library.opcheck(ops.scale_shift.default, (*inputs, True, impl))
    grad = torch.randn_like(inputs[0])
    torch.library.opcheck(ops.scale_shift_backward.default, (grad, *inputs, True, impl))


def test_compiles_whole_with_any_size(impl: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return scale_shift(scale_shift(x, scale, scale, relu=True, impl=impl), scale, shift, impl=impl).sin().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 8, 11):
        inputs = make_inputs((2, 4, size, size), device=device)
        loss, expected = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize(
    ("name", "x", "scale", "shift"),
    [
        ("x", (2, 4), (2, 4), (2, 4)),
        ("x", (2, 4, 0), (2, 4), (2, 4)),
        ("scale", (2, 4, 6), (4,), (2, 4)),
        ("scale", (2, 4, 6), (2, 5), (2, 4)),
        ("shift", (2, 4, 6, 6), (2, 4), (1, 4)),
    ],
)
def test_wrong_shapes_are_named(name: str, x: tuple[int, ...], scale: tuple[int, ...], shift: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must "):
        scale_shift(torch.zeros(x), torch.zeros(scale), torch.zeros(shift))


def test_wrong_dtypes_and_devices_are_named() -> None:
    x, scale, shift = (t.detach() for t in make_inputs((2, 4, 6, 5)))
    with pytest.raises(ValueError, match=r"^scale must be torch.float64 beside x of torch.float64, not torch.float32"):
        scale_shift(x.double(), scale, shift)
    with pytest.raises(ValueError, match=r"^shift must be torch.float32 beside x of torch.bfloat16, not torch.bf"):
        scale_shift(x.bfloat16(), scale, shift.bfloat16())
    with pytest.raises(ValueError, match=r"^shift must be on the device of x, cpu, not meta"):
        scale_shift(x, scale, shift.to("meta"))
    with pytest.raises(ValueError, match=r"^x must be float32, float16, bfloat16 or float64, not torch.int32"):
        scale_shift(x.int(), scale, shift)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((1, 33, 511, 501), contiguous, torch.float32),
        ((1, 601, 121, 119), channels_last, torch.float32),
        ((2, 33, 511, 501), channels_last, torch.bfloat16),
    ],
)
def test_maps_larger_than_the_caches(
    shape: tuple[int, ...], layout: Layout, dtype: torch.dtype, compiled_build: Impl
) -> None:
    """Their results are streamed, in runs that begin and end within the processor's vectors."""
    x, scale, shift = make_inputs(shape, layout, dtype)
    assert x.nbytes >= 32 << 20
    result = scale_shift(x, scale, shift, relu=True, impl=compiled_build)
    torch.testing.assert_close(result, formula(x, scale, shift, relu=True))
    grad = layout(torch.randn(shape).to(dtype))
    exact_x = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(formula(exact_x, scale, shift, relu=True), exact_x, grad)
    grad_x, *_ = torch.ops.utnetv2_fast.scale_shift_backward(grad, x, scale, shift, True, compiled_build)
    torch.testing.assert_close(grad_x, expected)
