"""A named backend runs or raises; "auto" runs what can; explain() says which and why."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from utnetv2_fast.ops import bidirectional_attention, depthwise_conv, depthwise_separable_conv, dispatch, explain
from utnetv2_fast.ops.extension import load_extension

Operator = Callable[..., object]
Shapes = tuple[tuple[int, ...], ...]

CALLS: list[tuple[Operator, Shapes]] = [
    (bidirectional_attention, ((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 3, 4), (1, 2, 3, 4))),
    (depthwise_conv, ((1, 4, 6, 6), (4, 1, 3, 3))),
    (depthwise_separable_conv, ((1, 4, 6, 6), (4, 1, 3, 3), (8, 4, 1, 1))),
]
each_operator = pytest.mark.parametrize(("operator", "shapes"), CALLS, ids=[call[0].__name__ for call in CALLS])


def assert_refused(operator: Operator, tensors: list[Tensor], impl: str, reason: str) -> None:
    """Named, `impl` raises with the reason that explain() gives; "auto" takes another backend."""
    explanation = explain(operator, *tensors)
    assert re.search(reason, explanation.refusals[impl])
    assert explanation.backend != impl
    with pytest.raises(NotImplementedError, match=f"cannot run with impl='{impl}': .*{reason}"):
        operator(*tensors, impl=impl)
    operator(*tensors)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@each_operator
def test_triton_is_refused_on_a_cpu(operator: Operator, shapes: Shapes, no_interpreter: None) -> None:
    tensors = [torch.ones(shape) for shape in shapes]
    assert_refused(operator, tensors, "triton", "it computes on a GPU, and these tensors are on cpu")


@each_operator
def test_triton_is_refused_where_it_is_not_installed(
    operator: Operator, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(operator, [torch.ones(shape) for shape in shapes], "triton", "triton is not installed")


def test_triton_is_refused_on_a_gpu_without_tensor_cores_for_bfloat16(
    no_interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert dispatch._triton_is_missing_on("cuda:0") == (
        "its kernels need a GPU of compute capability 8.0 or newer, and Tesla T4 is older"
    )


@pytest.mark.parametrize(
    ("operator", "shapes", "reason"),
    [
        (bidirectional_attention, ((1, 1, 2, 4),) * 2 + ((1, 1, 129, 4),) * 2, "at most 128 tokens, and map_q has 129"),
        (bidirectional_attention, ((1, 1, 2, 513),) * 2 + ((1, 1, 1, 513),) * 2, "at most 512 channels, and q has 513"),
        (depthwise_conv, ((1, 1, 2, 3), (1, 1, 19, 19)), "at most 343 taps, and the weight has 361"),
    ],
)
def test_triton_is_refused_beyond_its_limits(operator: Operator, shapes: Shapes, reason: str) -> None:
    if not dispatch.interprets_triton():
        pytest.skip("on the CPU only Triton's interpreter gets this far")
    assert_refused(operator, [torch.ones(shape) for shape in shapes], "triton", reason)


@each_operator
def test_triton_is_never_chosen_on_a_cpu(operator: Operator, shapes: Shapes) -> None:
    assert explain(operator, *map(torch.ones, shapes)).backend != "triton"


def test_triton_is_refused_what_it_was_found_wrong_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_distrusted", set())
    x, weight = torch.ones(1, 4, 6, 6), torch.ones(4, 1, 3, 3)
    dispatch.distrust_triton("depthwise_conv", x.device, x.dtype)
    assert_refused(depthwise_conv, [x, weight], "triton", "its results were found wrong on cpu in torch.float32")
    assert "wrong" not in explain(depthwise_conv, x.half(), weight.half()).refusals.get("triton", "")


@each_operator
def test_triton_is_refused_float64(operator: Operator, shapes: Shapes) -> None:
    if not dispatch.interprets_triton():
        pytest.skip("on the CPU only Triton's interpreter gets this far")
    assert_refused(operator, [torch.ones(shape).double() for shape in shapes], "triton", "these tensors are float64")


@each_operator
def test_cpu_is_refused_without_the_extension(
    operator: Operator, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "load_extension", lambda: None)
    assert_refused(operator, [torch.ones(shape) for shape in shapes], "cpu", "not built")


@each_operator
def test_cpu_is_refused_on_another_device(operator: Operator, shapes: Shapes) -> None:
    tensors = [torch.ones(shape, device="meta") for shape in shapes]
    assert_refused(operator, tensors, "cpu", "it computes on the CPU, and these tensors are on meta")


def test_instruction_sets_are_chosen_by_name() -> None:
    extension = load_extension()
    if extension is None:
        pytest.skip("the C++ extension is not built")
    known, before = ("baseline", "avx2", "avx512"), extension.instruction_set()
    assert before == extension.widest_instruction_set()
    widest = known.index(before)
    try:
        for name in known[: widest + 1]:
            extension.use_instruction_set(name)
            assert extension.instruction_set() == name
        for name in known[widest + 1 :]:
            with pytest.raises(ValueError, match=f"this processor has no {name} instructions"):
                extension.use_instruction_set(name)
        with pytest.raises(ValueError, match="must be 'baseline', 'avx2' or 'avx512', not 'neon'"):
            extension.use_instruction_set("neon")
        assert extension.instruction_set() == before
    finally:
        extension.use_instruction_set(before)


@each_operator
def test_an_unknown_backend_is_named(operator: Operator, shapes: Shapes) -> None:
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'reference', 'cpu', 'triton', not 'cuda'"):
        operator(*map(torch.ones, shapes), impl="cuda")


@each_operator
def test_explain_agrees_with_what_runs(operator: Operator, shapes: Shapes, device: torch.device) -> None:
    tensors: tuple[Tensor, ...] = tuple(torch.ones(shape, device=device) for shape in shapes)
    explanation = explain(operator, *tensors)
    assert explanation == explain(operator.__name__, *tensors)
    operator(*tensors, impl=explanation.backend)
    assert explanation.backend not in explanation.refusals
    for impl, reason in explanation.refusals.items():
        with pytest.raises(NotImplementedError, match=re.escape(reason)):
            operator(*tensors, impl=impl)
        assert f"not '{impl}': {reason}" in str(explanation)


def test_explain_refuses_what_is_no_operator() -> None:
    with pytest.raises(ValueError, match=r"operator must be one of bidirectional_attention, .* not 'softmax'"):
        explain("softmax", torch.ones(1))


@pytest.mark.skipif(load_extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_dense_weight_gradients_are_onednns_where_the_processor_has_instructions_for_them(
    wide: bool, dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_processor_multiplies_wide", lambda dtype: wide)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.ones(2, 4, 6, 6, dtype=dtype).to(memory_format=memory_format)
    weight = torch.ones(4, 4, 3, 3, dtype=dtype)
    ours = dtype == torch.float16 or (not wide and (channels_last or dtype == torch.bfloat16))
    assert explain("dense_conv_backward_weight", x, x, weight).backend == ("cpu" if ours else "reference")
