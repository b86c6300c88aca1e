"""The weight's gradient of a dense convolution against torch's autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utnetv2_fast.ops import dense_conv_backward_weight, dispatch, explain
from utnetv2_fast.ops.extension import load_extension

Case = tuple[tuple[int, ...], int, tuple[int, ...]]  # (B, C_in, *spatial), C_out, kernel

CASES: list[Case] = [
    ((2, 32, 12, 9), 24, (3, 3)),
    ((2, 5, 7, 8), 3, (5, 1)),
    ((1, 16, 6, 10, 8), 33, (3, 3, 3)),
    ((2, 7, 4, 9, 6), 18, (1, 3, 3)),
    ((2, 3, 2, 5, 4), 2, (7, 1, 5)),
    ((1, 1, 9, 11), 17, (3, 3)),  # taps in the product's rows
    ((2, 2, 3, 6, 5), 9, (3, 3, 5)),
    ((2, 40, 5, 6), 70, (1, 1)),
    ((1, 4, 1, 1), 4, (3, 3)),
    ((1, 1, 1, 1, 1), 1, (5, 3, 3)),
    ((0, 3, 4, 5), 2, (3, 3)),
    ((0, 3, 4, 5, 6), 2, (1, 1, 1)),
]


def formula(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    weight = weight.detach().requires_grad_()
    result = convolution(x, weight, padding=[k // 2 for k in weight.shape[2:]])
    return torch.autograd.grad(result, weight, grad_out)[0]


def contiguous(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def sliced(x: Tensor) -> Tensor:
    """Half of the channels and every other column of a larger tensor in channels-last, at the end of its memory."""
    b, c, *spatial = x.shape
    larger = torch.full((b, 2 * c, *spatial[:-1], 2 * spatial[-1]), torch.nan, dtype=x.dtype, device=x.device)
    larger = channels_last(larger)
    larger[:, c:, ..., 1::2] = x
    return larger[:, c:, ..., 1::2]


def permuted(x: Tensor) -> Tensor:
    """Neither channels-first nor channels-last: the batch varies fastest."""
    return x.permute(*range(1, x.ndim), 0).contiguous().permute(-1, *range(x.ndim - 1))


def broadcast(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


LAYOUTS = [contiguous, channels_last, sliced, permuted, broadcast]
Layout = Callable[[Tensor], Tensor]
needs_extension = pytest.mark.skipif(load_extension() is None, reason="the C++ extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor, impl: str) -> Tensor:
    """The op itself: it runs `impl` also where the public function leaves the work to torch."""
    result: Tensor = torch.ops.utnetv2_fast.dense_conv_backward_weight(grad_out, x, weight, impl)
    return result


def make_inputs(
    case: Case,
    layout: Layout = contiguous,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    grad_layout: Layout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, c_in, *spatial), c_out, kernel = case
    x = layout(torch.randn(b, c_in, *spatial, dtype=dtype, device=device))
    grad_out = (grad_layout or layout)(torch.randn(b, c_out, *spatial, dtype=dtype, device=device))
    return grad_out, x, torch.randn(c_out, c_in, *kernel, dtype=dtype, device=device)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_match_float64(
    case: Case, dtype: torch.dtype, layout: Layout, impl: str, assert_accurate: Callable[..., None]
) -> None:
    inputs = make_inputs(case, layout, dtype)
    exact = formula(*(t.double() for t in inputs))
    assert_accurate(backward_weight(*inputs, impl), formula(*inputs), exact, factor=3.0)


@needs_extension
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_maps_of_different_layouts(case: Case, grad_layout: Layout, assert_accurate: Callable[..., None]) -> None:
    inputs = make_inputs(case, channels_last, grad_layout=grad_layout)
    assert_accurate(backward_weight(*inputs, "cpu"), formula(*inputs), formula(*(t.double() for t in inputs)))


@needs_extension
@pytest.mark.parametrize(
    "case",
    [
        ((2, 70, 9, 40, 24), 70, (3, 3, 3)),  # several blocks of channels, chunks and pieces
        ((1, 300, 60, 50), 20, (1, 1)),
        ((3, 20, 90, 33), 300, (3, 1)),
        ((5, 30, 3, 4, 5), 40, (3, 3, 3)),  # several planes in a chunk
        ((1, 8, 13, 1500), 8, (5, 5)),  # rows longer than a product
        ((1, 24, 40, 60), 24, (9, 9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_larger_shapes(case: Case, layout: Layout, assert_accurate: Callable[..., None]) -> None:
    inputs = make_inputs(case, layout)
    assert_accurate(backward_weight(*inputs, "cpu"), formula(*inputs), formula(*(t.double() for t in inputs)))


odd = st.sampled_from([1, 3, 5])


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), odd), min_size=2, max_size=3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
)
def test_any_shape_in_any_layout(
    axes: list[tuple[int, int]], b: int, c_in: int, c_out: int, layout: Layout, grad_layout: Layout
) -> None:
    spatial, kernel = zip(*axes, strict=True)
    inputs = make_inputs(((b, c_in, *spatial), c_out, kernel), layout, torch.float64, grad_layout=grad_layout)
    torch.testing.assert_close(backward_weight(*inputs, "cpu"), formula(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES[2:4] + CASES[7:8], ids=str)
def test_result_has_the_layout_of_the_weight(case: Case, weight_layout: Layout, impl: str) -> None:
    grad_out, x, weight = make_inputs(case, channels_last)
    weight = weight_layout(weight)
    result = backward_weight(grad_out, x, weight, impl)
    assert result.stride() == torch.empty_like(weight).stride()
    torch.testing.assert_close(result, formula(grad_out, x, weight), rtol=1e-4, atol=1e-3)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_extension
@pytest.mark.parametrize("case", [((2, 40, 8, 24, 24), 20, (3, 3, 3)), ((1, 1, 50, 70), 8, (3, 3))], ids=str)
def test_the_number_of_threads_changes_no_bit(case: Case, threads: None) -> None:
    inputs = make_inputs(case, channels_last)
    expected = backward_weight(*inputs, "cpu")
    for count in (1, 2, 4, 4):
        torch.set_num_threads(count)
        assert torch.equal(backward_weight(*inputs, "cpu"), expected)


@needs_extension
def test_non_finite_values_stay_in_their_channels() -> None:
    grad_out, x, weight = make_inputs(((1, 20, 9, 9), 20, (3, 3)), channels_last)
    grad_out[:, 3], x[:, 7] = torch.inf, torch.nan
    finite = backward_weight(grad_out, x, weight, "cpu").isfinite().all(-1).all(-1)
    expected = torch.ones(20, 20, dtype=torch.bool)
    expected[3], expected[:, 7] = False, False
    assert torch.equal(finite, expected)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("case", [((2, 4, 6, 5), 3, (3, 3)), ((2, 4, 3, 6, 5), 6, (1, 3, 3))], ids=str)
def test_opcheck(case: Case, impl: str) -> None:
    for layout in LAYOUTS:
        arguments = (*make_inputs(case, layout), impl)
        torch.library.opcheck(torch.ops.utnetv2_fast.dense_conv_backward_weight.default, arguments)


@needs_extension
def test_auto_leaves_to_torch_what_torch_does_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor without AVX-512; with it, `test_dispatch` says, torch does more of it well."""
    monkeypatch.setattr(dispatch, "_processor_multiplies_wide", lambda dtype: False)
    spatial = ((2, 4, 6, 5), 3, (3, 3))
    pointwise = ((2, 4, 6, 5), 3, (1, 1))

    def backend(*inputs: Tensor) -> str:
        return explain(dense_conv_backward_weight, *inputs).backend

    assert backend(*make_inputs(spatial, channels_last)) == "cpu"
    assert backend(*make_inputs(spatial, contiguous, grad_layout=channels_last)) == "cpu"
    assert backend(*make_inputs(spatial, contiguous)) == "reference"
    assert backend(*make_inputs(pointwise, channels_last)) == "reference"
    for dtype in (torch.bfloat16, torch.float16):
        assert backend(*make_inputs(spatial, contiguous, dtype)) == "cpu"
        assert backend(*make_inputs(pointwise, channels_last, dtype)) == "cpu"
    with pytest.raises(NotImplementedError, match=r"cannot run with impl='cpu': .* a product of matrices"):
        dense_conv_backward_weight(*make_inputs(pointwise, channels_last), impl="cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=str)
def test_function(case: Case, layout: Layout, device: torch.device) -> None:
    inputs = make_inputs(case, layout, device=device)
    torch.testing.assert_close(dense_conv_backward_weight(*inputs), formula(*inputs), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "grad_out", "x", "weight"),
    [
        ("x", (2, 4, 6), (2, 4, 6), (4, 4, 3)),
        ("x", (2, 4, 6, 6), (2, 0, 6, 6), (4, 0, 3, 3)),
        ("x", (2, 4, 0, 6), (2, 4, 0, 6), (4, 4, 3, 3)),
        ("weight", (2, 4, 6, 6), (2, 4, 6, 6), (4, 4, 3)),
        ("weight", (2, 4, 6, 6), (2, 4, 6, 6), (4, 1, 3, 3)),
        ("weight", (2, 0, 6, 6), (2, 4, 6, 6), (0, 4, 3, 3)),
        ("weight", (2, 4, 6, 6), (2, 4, 6, 6), (4, 4, 3, 2)),
        ("grad_out", (2, 4, 6, 5), (2, 4, 6, 6), (4, 4, 3, 3)),
        ("grad_out", (2, 3, 6, 6), (2, 4, 6, 6), (4, 4, 3, 3)),
    ],
)
def test_wrong_shapes_are_named(
    name: str, grad_out: tuple[int, ...], x: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=f"^{name} must "):
        dense_conv_backward_weight(torch.zeros(grad_out), torch.zeros(x), torch.zeros(weight))


def test_mixed_dtypes_and_devices_are_named() -> None:
    grad_out, x, weight = make_inputs(((2, 4, 6, 5), 3, (3, 3)))
    with pytest.raises(ValueError, match=r"^weight must have the dtype of x, torch.float32, not torch.float64"):
        dense_conv_backward_weight(grad_out, x, weight.double())
    with pytest.raises(ValueError, match=r"^grad_out must be on the device of x, cpu, not meta"):
        dense_conv_backward_weight(grad_out.to("meta"), x, weight)
    with pytest.raises(ValueError, match=r"^x must be float32, float16, bfloat16 or float64, not torch.int32"):
        dense_conv_backward_weight(grad_out.int(), x.int(), weight.int())
