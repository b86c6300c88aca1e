"""Mean and variance of channels against torch's in float64, and their gradient beside that of other uses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from utnetv2_fast.ops import channel_moments, through_channel_moments

OPERATOR = channel_moments
SHAPES: list[tuple[int, ...]] = [
    (2, 32, 12, 9),
    (1, 5, 7, 8),
    (2, 16, 6, 10, 8),
    (2, 19, 70, 33),
    (1, 3, 5, 40, 41),
    (2, 600, 3, 3),
    (2, 7, 11),
    (3, 4, 1, 1),
    (1, 1, 1),
    (0, 3, 4, 5),
]


def formula(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, dim=tuple(range(2, x.ndim)), correction=0)
    return mean, variance


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_match_float64(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    impl: str,
    device: torch.device,
    skip_what_triton_lacks: Callable[[str, torch.dtype], None],
    assert_accurate: Callable[..., None],
) -> None:
    skip_what_triton_lacks(impl, dtype)
    # Around one: the mean of values around zero is as inaccurate as they are, not as it is itself.
    x = layout(torch.randn(shape, dtype=dtype, device=device) + 1).requires_grad_()
    statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    eager_x, exact_x = (x.detach().to(t).requires_grad_() for t in (statistics_dtype, torch.float64))
    results, eager, exact = channel_moments(x, impl=impl), formula(eager_x), formula(exact_x)
    for r, e, t in zip(results, eager, exact, strict=True):
        assert_accurate(r, e, t)
    grads = [torch.randn_like(r) for r in results]
    (gradient,) = torch.autograd.grad(results, x, grads)
    (eager_gradient,) = torch.autograd.grad(eager, eager_x, grads)
    (exact_gradient,) = torch.autograd.grad(exact, exact_x, [g.double() for g in grads])
    assert_accurate(gradient, eager_gradient.to(dtype), exact_gradient, factor=3.0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 3),
    c=st.integers(1, 20),
    spatial=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    other_layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_in_any_layout(
    b: int, c: int, spatial: list[int], layout: Layout, other_layout: Layout, impl: str, device: torch.device
) -> None:
    if impl == "triton":  # interpreted, each tile takes milliseconds
        spatial = [1 + size % 12 for size in spatial]
    x = layout(torch.randn(b, c, *spatial, device=device)).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    through, *results = through_channel_moments(x, impl=impl)
    exact = formula(exact_x)
    for r, e in zip(results, exact, strict=True):
        torch.testing.assert_close(r.double(), e, rtol=0, atol=1e-5)
    grads = [other_layout(torch.randn(b, c, *spatial, device=device)), *torch.randn(2, b, c, device=device).unbind()]
    (gradient,) = torch.autograd.grad([through, *results], x, grads)
    (exact_gradient,) = torch.autograd.grad([exact_x, *exact], exact_x, [g.double() for g in grads])
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("offset", [1e3, -1e6])
def test_a_large_mean_takes_no_digits_of_the_variance(
    offset: float, layout: Layout, impl: str, device: torch.device
) -> None:
    x = layout(torch.randn(2, 9, 17, 30, 31, device=device) + offset)
    _, variance = channel_moments(x, impl=impl)
    torch.testing.assert_close(variance.double(), formula(x.double())[1], rtol=1e-5, atol=0)


def test_a_step_in_the_values_takes_no_digits_of_the_variance(impl: str, device: torch.device) -> None:
    """The first positions tell nothing of the rest: zeros outside the scan, large values in it."""
    x = torch.randn(1, 2, 64, 64, 16, device=device) + 1e4
    x[:, :, :4] = 0
    for layout in (contiguous, channels_last):
        _, variance = channel_moments(layout(x), impl=impl)
        torch.testing.assert_close(variance.double(), formula(x.double())[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 5, 3, 4, 2), (1, 2, 6)], ids=str)
def test_gradcheck(shape: tuple[int, ...], layout: Layout, device: torch.device) -> None:
    x = layout(torch.randn(shape, dtype=torch.float64, device=device)).requires_grad_()
    assert gradcheck(channel_moments, (x,))

    def several_uses(x: Tensor) -> Tensor:
        through, mean, variance = through_channel_moments(x)
        over = (..., *[None] * (x.ndim - 2))
        return (through.sin() - mean[over]) * variance[over].rsqrt() + through

    assert gradcheck(several_uses, (x,))


@pytest.mark.parametrize("used", [0, 1, 2])
def test_results_without_a_use_get_no_gradient(used: int, impl: str, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    results = through_channel_moments(x, impl=impl)
    exact_x = x.detach().double().requires_grad_()
    exact = (exact_x * 1, *formula(exact_x))
    (gradient,) = torch.autograd.grad(results[used].sin().sum(), x)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(exact[used].sin().sum(), exact_x)[0])


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_repeats_and_thread_counts_are_bit_identical(layout: Layout) -> None:
    x = layout(torch.randn(2, 40, 10, 33, 29)).requires_grad_()
    grads = [torch.randn_like(x), torch.randn(2, 40), torch.randn(2, 40)]

    def run() -> list[Tensor]:
        results = through_channel_moments(x)
        return [*results[1:], *torch.autograd.grad(results, x, grads)]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 4):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_repeats_are_bit_identical(layout: Layout, impl: str, device: torch.device) -> None:
    x = layout(torch.randn(2, 6, 5, 33, 29, device=device)).requires_grad_()  # several partial moments of every channel
    grads = [torch.randn_like(x), *torch.randn(2, 2, 6, device=device).unbind()]

    def run() -> list[Tensor]:
        results = through_channel_moments(x, impl=impl)
        return [*results[1:], *torch.autograd.grad(results, x, grads)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
def test_offsets_beyond_two_to_the_31st(axis: int, impl: str, device: torch.device) -> None:
    size, far = 3, 2**30 + 8
    strides = [625, 125, 25, 5, 1]
    strides[axis] = far
    storage = torch.empty(2 * far + 3200, dtype=torch.float16, device=device)  # of which the view touches 486 values
    x = storage.as_strided((size,) * 5, strides).copy_(torch.randn((size,) * 5))
    other = storage[1600:].as_strided(x.shape, strides).copy_(torch.randn((size,) * 5))
    grads = torch.randn(2, size, size, device=device).unbind()
    ops = torch.ops.utnetv2_fast
    mean, variance = ops.channel_moments(x, impl)
    near = x.contiguous()
    expected_mean, expected_variance = ops.channel_moments(near, "reference")
    torch.testing.assert_close((mean, variance), (expected_mean, expected_variance))
    grad_x = ops.channel_moments_backward(*grads, x, mean, other, impl)
    expected = ops.channel_moments_backward(*grads, near, mean, other.contiguous(), "reference")
    torch.testing.assert_close(grad_x, expected)


def test_autocast_changes_nothing(impl: str, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        lowered = channel_moments(x, impl=impl)
    for got, want in zip(lowered, channel_moments(x, impl=impl), strict=True):
        assert torch.equal(got, want)


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
    x = layout(torch.randn(2, 4, 3, 6, 5, dtype=dtype, device=device))
    moments = [torch.randn(2, 4, device=device) for _ in range(3)]
    torch.library.opcheck(ops.channel_moments.default, (x, impl))
    for other in (None, torch.randn_like(x)):
        torch.library.opcheck(ops.channel_moments_backward.default, (*moments[:2], x, moments[2], other, impl))


def test_compiles_whole_with_any_size(impl: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def step(x: Tensor) -> Tensor:
        through, mean, variance = through_channel_moments(x, impl=impl)
        return (through.sin() * (mean + variance.sqrt())[:, :, None, None]).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 8, 11):
        x = torch.randn(2, 4, size, size, device=device, requires_grad=True)
        loss, expected = compiled(x), step(x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 1, 1, 1, 1), (2, 0, 3), (2, 3, 0)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^x must "):
        channel_moments(torch.zeros(shape))


def test_a_wrong_dtype_is_named() -> None:
    with pytest.raises(ValueError, match=r"^x must be float32, float16, bfloat16 or float64, not torch.int32"):
        channel_moments(torch.zeros(1, 2, 3, dtype=torch.int32))


@pytest.mark.parametrize(("shape", "layout"), [((1, 33, 511, 501), contiguous), ((1, 601, 121, 119), channels_last)])
def test_maps_larger_than_the_caches(shape: tuple[int, ...], layout: Layout, compiled_build: str) -> None:
    """Their gradients are streamed, in runs that begin and end within the processor's vectors."""
    x, other = layout(torch.randn(shape)), layout(torch.randn(shape))
    grad_mean, grad_variance, mean = torch.randn(3, *shape[:2])
    positions, over = shape[2] * shape[3], (..., None, None)
    gradients = positions * grad_mean, positions * grad_variance
    result = torch.ops.utnetv2_fast.channel_moments_backward(*gradients, x, mean, other, compiled_build)
    expected = other + grad_mean[over] + 2 * grad_variance[over] * (x - mean[over])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)
