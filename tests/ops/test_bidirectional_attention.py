"""Bidirectional attention against its formula in float64: any strides, any dtype, the corners of its domain."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from utnetv2_fast.ops import bidirectional_attention

OPERATOR = bidirectional_attention
Shape = tuple[int, int, int, int, int]  # B, H, n, l, d

# As in the paper (heads, map tokens and head sizes of ACDC, BCV, LiTS) over few tokens, then the corners.
SHAPES: list[Shape] = [
    (2, 2, 130, 9, 32),
    (1, 2, 96, 27, 80),
    (1, 2, 65, 64, 32),
    (1, 1, 64, 64, 128),
    (2, 3, 7, 72, 5),
    (2, 2, 1, 5, 3),
    (2, 2, 9, 1, 4),
    (1, 1, 1, 1, 1),
    (0, 2, 6, 3, 8),
]
# Tokens that a kernel cuts into many pieces, and the widest heads.
LARGER_SHAPES: list[Shape] = [(1, 2, 5003, 27, 80), (1, 1, 700, 64, 320), (2, 3, 2049, 72, 64)]
# Of Triton, whose interpreter is slow: tokens in several splits and tiles, the other heads of LiTS, the most that fits.
TRITON_SHAPES: list[Shape] = [
    (1, 1, 700, 27, 80),
    (1, 1, 70, 64, 256),
    (1, 1, 70, 64, 320),
    (1, 2, 300, 72, 64),
    (1, 1, 40, 128, 16),
    (1, 1, 33, 16, 512),
]


def formula(q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    scores = q @ map_q.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1) @ map_v, scores.softmax(-2).transpose(-1, -2) @ v


Randn = Callable[..., Tensor]


def contiguous(randn: Randn, b: int, h: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    return randn(b, h, n, d), randn(b, h, n, d)


def channels_first(randn: Randn, b: int, h: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Halves of one (B, C, n) map: n contiguous."""
    first, second = randn(b, 2 * h * d, n).chunk(2, 1)
    return first.unflatten(1, (h, d)).mT, second.unflatten(1, (h, d)).mT


def channels_last(randn: Randn, b: int, h: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Halves of one (B, n, C) map: d contiguous."""
    first, second = randn(b, n, 2 * h * d).chunk(2, 2)
    return first.unflatten(2, (h, d)).transpose(1, 2), second.unflatten(2, (h, d)).transpose(1, 2)


def interleaved(randn: Randn, b: int, h: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Halves of one (B, C, n) map whose channel c belongs to head c % H."""
    first, second = randn(b, 2 * h * d, n).chunk(2, 1)
    return first.unflatten(1, (d, h)).permute(0, 2, 3, 1), second.unflatten(1, (d, h)).permute(0, 2, 3, 1)


def sliced(randn: Randn, b: int, h: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Every other token of a longer map, from the second on; v from elsewhere and laid out otherwise."""
    return randn(b, h, 2 * n + 1, d + 2)[:, :, 1::2, 1:-1], randn(n, b, d, h).permute(1, 3, 0, 2)


def broadcast(randn: Randn, b: int, h: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    return randn(h, n, d).expand(b, h, n, d), randn(b, 1, n, d).expand(b, h, n, d)


LAYOUTS = [contiguous, channels_first, channels_last, interleaved, sliced, broadcast]
Layout = Callable[[Randn, int, int, int, int], tuple[Tensor, Tensor]]


def make_inputs(
    shape: Shape, layout: Layout, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    b, h, n, l, d = shape
    randn = functools.partial(torch.randn, dtype=dtype, device=device)
    return tuple(t.requires_grad_() for t in (*layout(randn, b, h, n, d), *layout(randn, b, h, l, d)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_match_float64(
    shape: Shape,
    dtype: torch.dtype,
    layout: Layout,
    build: str,
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    check_accuracy(shape, layout, dtype, device, build, assert_accurate)


@pytest.mark.parametrize("layout", [channels_first, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGER_SHAPES, ids=str)
def test_larger_results_and_gradients_match_float64(
    shape: Shape,
    dtype: torch.dtype,
    layout: Layout,
    compiled_build: str,
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    check_accuracy(shape, layout, dtype, device, compiled_build, assert_accurate)


@pytest.mark.parametrize("layout", [channels_first, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", TRITON_SHAPES, ids=str)
def test_triton_results_and_gradients_match_float64(
    shape: Shape,
    dtype: torch.dtype,
    layout: Layout,
    skip_refused: Callable[[str], str],
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    check_accuracy(shape, layout, dtype, device, skip_refused("triton"), assert_accurate)


def check_accuracy(
    shape: Shape,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
    impl: str,
    assert_accurate: Callable[..., None],
) -> None:
    inputs = make_inputs(shape, layout, dtype, device)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    results, eager, exact = bidirectional_attention(*inputs, impl=impl), formula(*inputs), formula(*exact_inputs)
    others = make_inputs(shape, layout, dtype, device)  # so that incoming gradients have odd strides too
    grads = (others[1].detach(), others[3].detach())
    gradients = torch.autograd.grad(results, inputs, grads)
    eager_gradients = torch.autograd.grad(eager, inputs, grads)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, tuple(g.double() for g in grads))
    for r, e, x in zip(results, eager, exact, strict=True):
        assert_accurate(r, e, x)
    for r, e, x in zip(gradients, eager_gradients, exact_gradients, strict=True):
        assert_accurate(r, e, x, factor=3.0)


few = st.integers(1, 40)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(b=st.integers(1, 3), h=st.integers(1, 3), n=few, l=few, d=few, data=st.data())
def test_any_shape_in_any_layout(
    b: int, h: int, n: int, l: int, d: int, data: st.DataObject, impl: str, device: torch.device
) -> None:
    randn = functools.partial(torch.randn, device=device)
    q, v = data.draw(st.sampled_from(LAYOUTS))(randn, b, h, n, d)
    map_q, map_v = data.draw(st.sampled_from(LAYOUTS))(randn, b, h, l, d)
    scale = data.draw(st.sampled_from([None, -0.5, 0.0, 3.0]))
    out, map_out = bidirectional_attention(q, v, map_q, map_v, scale=scale, impl=impl)
    exact = formula(q.double(), v.double(), map_q.double(), map_v.double(), scale)
    torch.testing.assert_close(out.double(), exact[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(map_out.double(), exact[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("need_map", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 7, 3, 4), (1, 1, 1, 4, 2), (1, 2, 4, 1, 2)], ids=str)
def test_gradcheck(
    shape: Shape,
    need_map: bool,
    build: str,
    device: torch.device,
    skip_what_triton_lacks: Callable[[str, torch.dtype], None],
) -> None:
    skip_what_triton_lacks(build, torch.float64)
    inputs = make_inputs(shape, channels_first, torch.float64, device)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, map_out = bidirectional_attention(*tensors, need_map=need_map, impl=build)
        return (out,) if map_out is None else (out, map_out)

    assert gradcheck(run, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_keep_the_layout_of_their_input(layout: Layout, impl: str, device: torch.device) -> None:
    inputs = make_inputs((2, 3, 8, 5, 4), layout, device=device)
    out, map_out = bidirectional_attention(*inputs, impl=impl)
    gradients = torch.autograd.grad((out, map_out), inputs, (torch.ones_like(out), torch.ones_like(map_out)))
    for result, like in zip((out, map_out, *gradients), (inputs[0], inputs[2], *inputs), strict=True):
        assert result.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize("layout", [contiguous, channels_first])
def test_without_map_only_the_tokens_are_updated(layout: Layout, impl: str, device: torch.device) -> None:
    inputs = make_inputs((2, 2, 33, 9, 8), layout, device=device)
    out, map_out = bidirectional_attention(*inputs, need_map=False, impl=impl)
    assert map_out is None
    both = bidirectional_attention(*inputs, impl=impl)
    if impl == "triton":  # with a map, one exponential serves both softmaxes
        torch.testing.assert_close(out, both[0])
    else:
        assert torch.equal(out, both[0])
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, weights, allow_unused=True)
    expected = torch.autograd.grad(both[0], inputs, weights)
    assert gradients[1] is None
    for got, want in zip(gradients[::2] + gradients[3:], expected[::2] + expected[3:], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_scores(
    size: float, dtype: torch.dtype, build: str, device: torch.device, assert_accurate: Callable[..., None]
) -> None:
    """Scores of +-1e4: one token of each softmax takes all, whole rows and columns are far from zero."""
    q, v, map_q, map_v = make_inputs((1, 2, 40, 9, 4), contiguous, dtype, device)
    with torch.no_grad():
        q[..., 0], map_q[..., 0] = 100.0, size / 100.0
        q[:, :, 3], map_q[:, :, 2] = 0.0, 0.0
    inputs = (q, v, map_q, map_v)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    results, eager = bidirectional_attention(*inputs, scale=1.0, impl=build), formula(*inputs, scale=1.0)
    exact = formula(*exact_inputs, scale=1.0)
    for r, e, x in zip(results, eager, exact, strict=True):
        assert_accurate(r, e, x)
    gradients = torch.autograd.grad(results, inputs, tuple(torch.ones_like(r) for r in results))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("n", [40, 700, 3000])
@pytest.mark.parametrize("spread", [30.0, 60.0, 120.0])
@pytest.mark.parametrize("low", ["rows", "columns", "both", "late"])
def test_rows_and_columns_far_below_the_others(
    low: str, spread: float, n: int, build: str, device: torch.device, assert_accurate: Callable[..., None]
) -> None:
    """One exponential cannot serve both softmaxes where a whole row or column of scores underflows beside the rest."""
    inputs = make_inputs((1, 2, n, 9, 8), channels_first, torch.float32, device)
    q, _, map_q, _ = inputs
    with torch.no_grad():
        # Channels 0 and 1 add a term of the token alone and one of the semantic token alone to the scores.
        q[..., 1], map_q[..., 0] = 1.0, 1.0
        q[..., 0] = -spread * (torch.arange(n, device=device) % 3 == 1) if low in ("rows", "both") else 0.0
        map_q[..., 1] = -spread * (torch.arange(9, device=device) % 4 == 2) if low in ("columns", "both") else 0.0
        if low == "late":  # the largest scores come last
            q[..., 0] = spread * torch.linspace(-1, 1, n, device=device)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    results, eager = bidirectional_attention(*inputs, scale=1.0, impl=build), formula(*inputs, scale=1.0)
    exact = formula(*exact_inputs, scale=1.0)
    grads = tuple(torch.randn_like(r) for r in results)
    gradients = torch.autograd.grad(results, inputs, grads)
    eager_gradients = torch.autograd.grad(eager, inputs, grads)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, tuple(g.double() for g in grads))
    for r, e, x in zip(results, eager, exact, strict=True):
        assert_accurate(r, e, x)
    for r, e, x in zip(gradients, eager_gradients, exact_gradients, strict=True):
        assert_accurate(r, e, x, factor=3.0)


def test_one_tensor_in_several_places(
    impl: str, device: torch.device, skip_what_triton_lacks: Callable[[str, torch.dtype], None]
) -> None:
    skip_what_triton_lacks(impl, torch.float64)
    q, _, map_q, _ = make_inputs((2, 2, 9, 5, 4), channels_last, torch.float64, device)
    assert gradcheck(lambda q, m: bidirectional_attention(q, q, m, m, impl=impl), (q, map_q))
    assert gradcheck(lambda q: bidirectional_attention(q, q, q, q, impl=impl), (q,))


def test_repeats_are_bit_identical(impl: str, device: torch.device) -> None:
    inputs = make_inputs((2, 4, 500, 27, 32), channels_first, device=device)
    run = results_and_gradients(inputs, impl)
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("layout", [channels_first, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGER_SHAPES, ids=str)
def test_the_number_of_threads_changes_no_bit(
    shape: Shape,
    dtype: torch.dtype,
    layout: Layout,
    compiled: str,
    device: torch.device,
    assert_same_bits_on_any_threads: Callable[..., None],
) -> None:
    assert_same_bits_on_any_threads(results_and_gradients(make_inputs(shape, layout, dtype, device), compiled))


@pytest.mark.parametrize("far", ["tokens", "channels", "samples"])
def test_offsets_beyond_2_to_the_31(
    far: str, impl: str, device: torch.device, assert_accurate: Callable[..., None]
) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 6 << 30:
        pytest.skip("takes 4 GiB of the GPU")
    distance = 2**31 + 8
    strides = {"tokens": (16, 8, distance, 1), "channels": (16, 8, 1, distance), "samples": (distance, 8, 2, 1)}[far]
    memory = torch.empty(distance + 64, dtype=torch.float16, device=device)  # 4 GiB, of which two pages are touched
    q = memory.as_strided((2, 2, 2, 2), strides)
    if far != "samples":
        q = q[:1, :1]
    q.copy_(torch.randn_like(q, memory_format=torch.contiguous_format))
    map_q, map_v = (torch.randn(*q.shape[:2], 3, 2, dtype=q.dtype, device=device) for _ in range(2))
    inputs = (q, q, map_q, map_v)
    exact, eager = formula(*(t.double() for t in inputs)), formula(*(t.contiguous() for t in inputs))
    for r, e, x in zip(bidirectional_attention(*inputs, impl=impl), eager, exact, strict=True):
        assert_accurate(r, e, x)
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    grads = (torch.ones_like(map_q[:, :, :2]), torch.ones_like(map_q))
    gradients = torch.autograd.grad(bidirectional_attention(*leaves, impl=impl), leaves, grads)
    near = tuple(t.detach().contiguous().requires_grad_() for t in inputs)
    for got, want in zip(gradients, torch.autograd.grad(formula(*near), near, grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def results_and_gradients(inputs: tuple[Tensor, ...], impl: str) -> Callable[[], list[Tensor]]:
    grads = (torch.randn_like(inputs[0]), torch.randn_like(inputs[2]))

    def run() -> list[Tensor]:
        results = bidirectional_attention(*inputs, impl=impl)
        return [*results, *torch.autograd.grad(results, inputs, grads)]

    return run


def test_saves_nothing_of_size_n_times_l(impl: str, device: torch.device) -> None:
    n, l, d = 64, 32, 4
    inputs = make_inputs((1, 1, n, l, d), contiguous, device=device)
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bidirectional_attention(*inputs, impl=impl)
    assert sorted(sizes) == sorted([n * d, n * d, l * d, l * d, l * d, l])  # the inputs, map_out, column_lse


def test_second_derivatives_are_refused(impl: str, device: torch.device) -> None:
    inputs = make_inputs((1, 1, 4, 3, 2), contiguous, device=device)
    loss = bidirectional_attention(*inputs, impl=impl)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("need_map", [True, False])
def test_autocast_lowers_like_scaled_dot_product_attention(
    need_map: bool, impl: str, device: torch.device, skip_what_triton_lacks: Callable[[str, torch.dtype], None]
) -> None:
    skip_what_triton_lacks(impl, torch.bfloat16)
    inputs = make_inputs((2, 2, 33, 9, 8), channels_first, device=device)
    lowered = tuple(t.detach().bfloat16().requires_grad_() for t in inputs)
    with torch.autocast(device.type, torch.bfloat16):
        results = [r for r in bidirectional_attention(*inputs, need_map=need_map, impl=impl) if r is not None]
        assert results[0].dtype == torch.nn.functional.scaled_dot_product_attention(*inputs[2:], inputs[3]).dtype
        # Backward inside the region too: its float32 products must stay float32.
        gradients = torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results], allow_unused=True)
    expected = [r for r in bidirectional_attention(*lowered, need_map=need_map, impl=impl) if r is not None]
    wanted = torch.autograd.grad(expected, lowered, [torch.ones_like(r) for r in expected], allow_unused=True)
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(gradients, wanted, strict=True):
        assert want is None or (got.dtype == torch.float32 and torch.equal(got, want.float()))


def test_autocast_leaves_float64_alone() -> None:
    inputs = make_inputs((1, 2, 5, 3, 4), contiguous, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = bidirectional_attention(*inputs)
    assert torch.equal(out, bidirectional_attention(*inputs)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layout: Layout, dtype: torch.dtype, impl: str, device: torch.device) -> None:
    ops = torch.ops.utnetv2_fast
    q, v, map_q, map_v = (t.detach() for t in make_inputs((2, 2, 7, 3, 4), layout, dtype, device))
    _, map_out, column_lse = ops.bidirectional_attention(q, v, map_q, map_v, 0.5, impl)
    grad_out, grad_map_out = torch.randn_like(q), torch.randn_like(map_q)
    calls = {
        "bidirectional_attention": (q, v, map_q, map_v),
        "bidirectional_attention_backward": (grad_out, grad_map_out, q, v, map_q, map_v, map_out, column_lse),
        "token_attention": (q, map_q, map_v),
        "token_attention_backward": (grad_out, q, map_q, map_v),
    }
    for name, tensors in calls.items():
        torch.library.opcheck(getattr(ops, name).default, (*tensors, 0.5, impl))


def test_compiles_whole_with_any_number_of_tokens(impl: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def step(qv: Tensor, maps: Tensor, same: Tensor) -> Tensor:
        q, v = (t.unflatten(1, (2, -1)).mT for t in qv.chunk(2, 1))
        map_q, map_v = (t.unflatten(1, (2, -1)).mT for t in maps.chunk(2, 1))
        out, map_out = bidirectional_attention(q, v, map_q, map_v, impl=impl)
        out, map_out = bidirectional_attention(out, out, map_out, map_out, impl=impl)
        out, _ = bidirectional_attention(out, same, map_out, same[:, :, :5], need_map=False, impl=impl)
        return out.sin().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (12, 31, 64):
        qv, maps = torch.randn(2, 16, n, device=device), torch.randn(2, 16, 5, device=device)
        inputs = (qv.requires_grad_(), maps.requires_grad_(), torch.randn(2, 2, n, 4, device=device))
        loss, expected = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, inputs[:2])
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs[:2]))


def test_compiles_with_inductor(impl: str, device: torch.device) -> None:
    inputs = make_inputs((2, 2, 12, 5, 4), interleaved, device=device)

    def loss(*tensors: Tensor) -> Tensor:
        out, map_out = bidirectional_attention(*tensors, impl=impl)
        return out.sum() + map_out.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    gradients = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(*inputs), inputs))


SMALL = {"q": (2, 2, 6, 4), "v": (2, 2, 6, 4), "map_q": (2, 2, 3, 4), "map_v": (2, 2, 3, 4)}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (2, 6, 4)),
        ("v", (2, 2, 5, 4)),
        ("v", (2, 2, 6, 8)),
        ("map_q", (2, 2, 3, 5)),
        ("map_q", (1, 2, 3, 4)),
        ("map_q", (2, 3, 4)),
        ("map_v", (2, 2, 4, 4)),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    tensors = {key: torch.zeros(size) for key, size in SMALL.items()} | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"^{name} must .*{re.escape(str(shape))}$"):
        bidirectional_attention(**tensors)


@pytest.mark.parametrize(
    "sizes", [{"q": (2, 2, 0, 4), "v": (2, 2, 0, 4)}, {"map_q": (2, 2, 0, 4), "map_v": (2, 2, 0, 4)}]
)
def test_a_softmax_over_nothing_is_refused(sizes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="n, l and d must be at least 1"):
        bidirectional_attention(**{key: torch.zeros(size) for key, size in (SMALL | sizes).items()})


@pytest.mark.parametrize("name", ["v", "map_q", "map_v"])
def test_mixed_dtypes_and_devices_are_named(name: str) -> None:
    tensors = {key: torch.zeros(size) for key, size in SMALL.items()}
    with pytest.raises(ValueError, match=rf"^{name} must have the dtype of q, torch.float32, not torch.float16"):
        bidirectional_attention(**tensors | {name: tensors[name].half()})
    with pytest.raises(ValueError, match=rf"^{name} must be on the device of q, cpu, not meta"):
        bidirectional_attention(**tensors | {name: tensors[name].to("meta")})


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^q must be float32, float16, bfloat16 or float64, not torch.int64"):
        bidirectional_attention(**{key: torch.zeros(size, dtype=torch.int64) for key, size in SMALL.items()})
