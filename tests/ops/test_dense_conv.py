"""Dense convolution by Winograd's minimal filtering against torch's in float64, and the function that chooses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from utnetv2_fast.ops import dense_conv, dispatch, explain
from utnetv2_fast.ops.extension import load_extension

ops = torch.ops.utnetv2_fast
Case = tuple[tuple[int, ...], int, tuple[int, ...]]  # (B, C_in, *spatial), C_out, kernel

CASES: list[Case] = [
    ((2, 32, 12, 10), 24, (3, 3)),
    ((2, 20, 9, 13), 40, (3, 3)),  # tiles that the map ends within, channels that vectors end within
    ((1, 17, 3, 7, 6), 33, (3, 3, 3)),  # a plane's last vector of channels reaches into the next plane's
    ((2, 7, 4, 9, 6), 18, (1, 3, 3)),
    ((1, 5, 2, 4, 5), 3, (5, 3, 3)),  # taps reach over all planes
    ((1, 16, 5, 150), 16, (3, 3)),  # several pieces in a row of tiles
    ((1, 40, 6, 31, 18), 36, (3, 3, 3)),  # several rows of tiles in a piece
    ((3, 1, 1, 1), 1, (3, 3)),
    ((1, 2, 1, 1, 3), 70, (3, 3, 3)),
    ((0, 16, 4, 4), 16, (3, 3)),
]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x: Tensor) -> Tensor:
    """Half of the channels and every other column of a larger map of NaN, at the end of its memory."""
    b, c, *spatial = x.shape
    larger = torch.full((b, *spatial[:-1], 2 * spatial[-1], 2 * c), torch.nan, dtype=x.dtype).movedim(-1, 1)
    larger[:, c:, ..., 1::2] = x
    return larger[:, c:, ..., 1::2]


def flipped_axes(x: Tensor) -> Tensor:
    """Channels vary fastest, then rows, then the batch, then columns."""
    axes = (x.ndim - 1, 0, *range(2, x.ndim - 1), 1)
    return x.permute(axes).contiguous().permute(*(axes.index(i) for i in range(x.ndim)))


LAYOUTS = [channels_last, sliced, flipped_axes]
Layout = Callable[[Tensor], Tensor]
needs_extension = pytest.mark.skipif(load_extension() is None, reason="the C++ extension is not built")


def formula(x: Tensor, weight: Tensor) -> Tensor:
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(x, weight, padding=[k // 2 for k in weight.shape[2:]])


def formula_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(formula(x, weight), weight, grad_out)[0]


def scaled(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    over = (..., *[None] * (x.ndim - 2))
    y = x * scale[over].to(x.dtype) + shift[over].to(x.dtype)
    return y.relu() if relu else y


def make_inputs(
    case: Case, layout: Layout = channels_last, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_out, x and weight."""
    (b, c_in, *spatial), c_out, kernel = case
    x = layout(torch.randn(b, c_in, *spatial, dtype=dtype))
    return layout(torch.randn(b, c_out, *spatial, dtype=dtype)), x, torch.randn(c_out, c_in, *kernel, dtype=dtype)


def scale_and_shift(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) each, of strides of their own."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.randn(2, x.shape[1], x.shape[0], dtype=dtype).transpose(1, 2).unbind(0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_match_float64(
    case: Case, dtype: torch.dtype, layout: Layout, instructions: str, assert_accurate: Callable[..., None]
) -> None:
    grad_out, x, weight = make_inputs(case, layout, dtype)
    wide = [t.double() for t in (grad_out, x, weight)]
    assert_accurate(ops.dense_conv(x, weight), formula(x, weight), formula(*wide[1:]))
    gradient = ops.dense_conv_backward_weight(grad_out, x, weight, "cpu")
    assert_accurate(gradient, formula_backward_weight(grad_out, x, weight), formula_backward_weight(*wide), factor=3.0)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[8]], ids=str)
def test_scaled_results_match_float64(
    case: Case, dtype: torch.dtype, relu: bool, instructions: str, assert_accurate: Callable[..., None]
) -> None:
    """The padding is zeros of the normalised map, not of x."""
    grad_out, x, weight = make_inputs(case, sliced, dtype)
    scale, shift = scale_and_shift(x)
    wide_x, wide_grad, wide_weight = x.double(), grad_out.double(), weight.double()
    exact_y, eager_y = scaled(wide_x, scale.double(), shift.double(), relu), scaled(x, scale, shift, relu)
    result = ops.scaled_dense_conv(x, scale, shift, relu, weight)
    assert_accurate(result, formula(eager_y, weight), formula(exact_y, wide_weight))
    gradient = ops.scaled_dense_conv_backward_weight(grad_out, x, scale, shift, relu, weight)
    eager = formula_backward_weight(grad_out, eager_y, weight)
    assert_accurate(gradient, eager, formula_backward_weight(wide_grad, exact_y, wide_weight), factor=3.0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 3, 5]),
    st.sampled_from(LAYOUTS),
)
def test_any_shape_in_any_layout(
    instructions: str, spatial: list[int], b: int, c_in: int, c_out: int, taps: int, layout: Layout
) -> None:
    kernel = (taps, 3, 3)[3 - len(spatial) :]
    grad_out, x, weight = make_inputs(((b, c_in, *spatial), c_out, kernel), layout, torch.float64)
    torch.testing.assert_close(ops.dense_conv(x, weight), formula(x, weight), rtol=1e-10, atol=1e-10)
    gradient = ops.dense_conv_backward_weight(grad_out, x, weight, "cpu")
    torch.testing.assert_close(gradient, formula_backward_weight(grad_out, x, weight), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [32, 33])
def test_maps_larger_than_the_caches(channels: int, instructions: str, assert_accurate: Callable[..., None]) -> None:
    """The result is streamed where vectors of channels are aligned."""
    _, x, weight = make_inputs(((1, 3, 2, 365, 361), channels, (1, 3, 3)))
    result = ops.dense_conv(x, weight)
    assert result.nbytes >= 32 << 20
    assert_accurate(result, formula(x, weight), formula(x.double(), weight.double()))


@needs_extension
@pytest.mark.parametrize("case", [((2, 40, 8, 24, 24), 20, (3, 3, 3)), ((1, 130, 50, 70), 70, (3, 3))], ids=str)
def test_the_number_of_threads_changes_no_bit(
    case: Case, assert_same_bits_on_any_threads: Callable[[Callable[[], list[Tensor]]], None]
) -> None:
    grad_out, x, weight = make_inputs(case)

    def run() -> list[Tensor]:
        gradient = ops.dense_conv_backward_weight(grad_out, x, weight, "cpu")
        return [ops.dense_conv(x, weight), gradient]

    assert_same_bits_on_any_threads(run)


@needs_extension
def test_non_finite_values_reach_no_further_than_a_tile() -> None:
    """4 x 4 positions share the arithmetic, so that an infinity may reach one position further than its taps do."""
    _, x, weight = make_inputs(((2, 16, 3, 12, 12), 16, (1, 3, 3)))
    x[0, 5, 1, 6, 6] = torch.inf
    finite = ops.dense_conv(x, weight).isfinite()
    assert not finite[0, :, 1, 5:8, 5:8].any()
    finite[0, :, 1, 4:9, 4:9] = True
    assert finite.all()


@needs_extension
@pytest.mark.parametrize("case", [CASES[0], ((2, 18, 4, 9, 6), 24, (3, 3, 3)), ((2, 4, 6, 5), 6, (5, 3))], ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, *LAYOUTS])
def test_the_function_and_its_gradients(case: Case, layout: Layout, assert_accurate: Callable[..., None]) -> None:
    """In every layout, by whatever kernel."""
    grad_out, x, weight = make_inputs(case, layout)

    def run(function: Callable[[Tensor, Tensor], Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in tensors[1:]]
        result = function(*inputs)
        return result.detach(), *torch.autograd.grad(result, inputs, tensors[0])

    exact = run(formula, *(t.double() for t in (grad_out, x, weight)))
    for got, eager, want in zip(
        run(dense_conv, grad_out, x, weight), run(formula, grad_out, x, weight), exact, strict=True
    ):
        assert_accurate(got, eager, want, factor=3.0)


@needs_extension
def test_result_is_channels_last_where_the_input_is() -> None:
    _, x, weight = make_inputs(CASES[0])
    assert dense_conv(x, weight).is_contiguous(memory_format=torch.channels_last)
    assert dense_conv(x.contiguous(), weight).is_contiguous()


@needs_extension
def test_auto_takes_what_is_faster() -> None:
    _, x, weight = make_inputs(((1, 16, 6, 8), 16, (3, 3)))
    assert explain(dense_conv, x, weight).backend == "cpu"
    refusals = {
        "its kernel takes maps whose channels lie side by side": (x.contiguous(), weight),
        "its kernel has 3 x 3 taps in planes, and the weight 5 x 3": (x, torch.ones(16, 16, 5, 3)),
        "its kernel pays from 16 channels on either side, and there are 15": (x, weight[:15]),
        "its kernel computes in float32, and these tensors are torch.bfloat16": (x.bfloat16(), weight.bfloat16()),
    }
    for reason, tensors in refusals.items():
        explanation = explain(dense_conv, *tensors)
        assert explanation.backend == "reference"
        assert reason in explanation.refusals["cpu"]
        with pytest.raises(NotImplementedError, match=f"dense_conv cannot run with impl='cpu': {reason}"):
            dense_conv(*tensors, impl="cpu")
        torch.testing.assert_close(dense_conv(*tensors), formula(*tensors))


@needs_extension
def test_weight_gradients_run_where_the_convolution_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_processor_multiplies_wide", lambda dtype: True)
    grad_out, x, weight = make_inputs(((1, 16, 6, 8), 16, (3, 3)))
    assert explain("dense_conv_backward_weight", grad_out, x, weight).backend == "cpu"
    assert explain("dense_conv_backward_weight", grad_out.contiguous(), x, weight).backend == "reference"


@needs_extension
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_opcheck(case: Case) -> None:
    for layout in LAYOUTS:
        grad_out, x, weight = make_inputs(case, layout)
        scale, shift = scale_and_shift(x)
        torch.library.opcheck(ops.dense_conv.default, (x, weight))
        torch.library.opcheck(ops.scaled_dense_conv.default, (x, scale, shift, True, weight))
        arguments = (grad_out, x, scale, shift, True, weight)
        torch.library.opcheck(ops.scaled_dense_conv_backward_weight.default, arguments)


@needs_extension
def test_what_the_kernel_cannot_read_is_refused_by_the_op_itself() -> None:
    _, x, weight = make_inputs(CASES[0])
    with pytest.raises(NotImplementedError, match="channels lie side by side"):
        ops.dense_conv(x.contiguous(), weight)
    with pytest.raises(NotImplementedError, match="3 x 3 taps in planes, and the weight 5 x 3"):
        ops.dense_conv(x, torch.ones(24, 32, 5, 3))


@needs_extension
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 1)], ids=str)
def test_compiles_as_one_graph_of_any_size(kernel: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dense_conv, fullgraph=True, dynamic=True)
    for size in (6, 9):
        _, x, weight = make_inputs(((2, 16, size, 8), 16, kernel))
        torch.testing.assert_close(compiled(x, weight), formula(x, weight), rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize(("need_x", "need_weight"), [(True, False), (False, True)])
def test_gradients_of_one_argument_and_of_a_sum(need_x: bool, need_weight: bool) -> None:
    """The gradient of a sum is one number with strides of zero."""
    _, x, weight = make_inputs(CASES[0])
    x_, weight_ = x.requires_grad_(need_x), weight.requires_grad_(need_weight)
    dense_conv(x_, weight_).sum().backward()
    got, other = (x_.grad, weight_.grad) if need_x else (weight_.grad, x_.grad)
    assert other is None
    leaf = x if need_x else weight
    (expected,) = torch.autograd.grad(formula(x, weight).sum(), leaf)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_autocast_lowers_the_arguments() -> None:
    _, x, weight = make_inputs(CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert dense_conv(x, weight).dtype == torch.bfloat16


def test_wrong_weights_are_named() -> None:
    x = torch.zeros(2, 4, 6, 6)
    with pytest.raises(ValueError, match=r"^weight must be \(C_out, C_in, \*k\) with C_in = 4"):
        dense_conv(x, torch.zeros(4, 5, 3, 3))
    with pytest.raises(ValueError, match=r"^weight must have odd kernel sizes"):
        dense_conv(x, torch.zeros(4, 4, 2, 3))
