"""The check of this machine's kernels finds every wrong one, and then nothing runs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from utnetv2_fast.ops import (
    bidirectional_attention,
    channel_moments,
    depthwise_conv,
    depthwise_separable_conv,
    dispatch,
    explain,
    scale_shift,
    self_check,
)
from utnetv2_fast.ops.self_check import EXAMPLES, check, check_kernels, distrust_wrong_kernels, example

USED_BY = {
    "token_attention": "bidirectional_attention",
    "scaled_depthwise_conv": "depthwise_conv",
    "scaled_depthwise_separable_conv": "depthwise_separable_conv",
}


# Little work for the interpreter.
SMALL_EXAMPLES = {
    bidirectional_attention: lambda scale: (*[(1, 1, 5, 4)] * 2, *[(1, 1, 3, 4)] * 2),
    channel_moments: lambda scale: ((1, 4, 2, 3, 4),),
    depthwise_conv: lambda scale: ((1, 4, 2, 3, 4), (4, 1, 1, 3, 3)),
    depthwise_separable_conv: lambda scale: ((1, 4, 2, 3, 4), (4, 1, 1, 3, 1), (6, 4, 1, 1, 1)),
    scale_shift: lambda scale: ((1, 4, 2, 3, 4), (1, 4), (1, 4)),
}


@pytest.fixture
def triton(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the Triton operators, all trusted, and only the two quick ones to be checked."""
    refusals = explain(scale_shift, *example(scale_shift, device)).refusals
    if "triton" in refusals:
        pytest.skip(refusals["triton"])
    monkeypatch.setattr(dispatch, "_distrusted", set())
    monkeypatch.setattr(
        self_check, "EXAMPLES", {operator: EXAMPLES[operator] for operator in (channel_moments, scale_shift)}
    )
    distrust_wrong_kernels.cache_clear()
    yield importlib.import_module("utnetv2_fast.ops.triton")
    distrust_wrong_kernels.cache_clear()


def scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        results = function(*arguments)
        return tuple(r * factor for r in results) if isinstance(results, tuple) else results * factor

    return run


def failing(*_: object) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this chip")


def test_right_kernels_stay_trusted(triton: ModuleType, device: torch.device) -> None:
    assert distrust_wrong_kernels(device, torch.float32) == ()
    assert "triton" not in explain(scale_shift, *example(scale_shift, device)).refusals


@pytest.mark.parametrize(
    ("replace", "problem"),
    [
        (lambda right: scaled(right, 1.1), "off by 1.0e-01 of the largest value"),
        (lambda right: scaled(right, torch.nan), "off by nan"),
        (lambda right: failing, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_wrong_kernel_is_never_run_again(
    replace: Callable[..., Any], problem: str, triton: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "scale_shift", replace(triton.scale_shift))
    [(operator, found)] = distrust_wrong_kernels(device, torch.float32)
    assert operator == "scale_shift"
    assert found.startswith(problem)
    inputs = example(scale_shift, device)
    explanation = explain(scale_shift, *inputs)
    assert "found wrong" in explanation.refusals["triton"]
    assert explanation.backend != "triton"
    with pytest.raises(NotImplementedError, match="found wrong"):
        scale_shift(*inputs, impl="triton")
    # What was not found wrong is as it was: the other operators, and this one in another dtype.
    assert "triton" not in explain(channel_moments, inputs[0]).refusals
    assert "triton" not in explain(scale_shift, *example(scale_shift, device, torch.float16)).refusals


def test_every_kernel_is_checked(triton: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "EXAMPLES", SMALL_EXAMPLES)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # in float32 the fused kernel runs with it alone
    operators = {operator.__name__: operator for operator in EXAMPLES}
    for operator in operators.values():
        assert check(operator, device, torch.float32, "triton").problem is None
    for name in triton.__all__:
        used_by = name.removesuffix("_weight").removesuffix("_backward")
        with monkeypatch.context() as patch:
            patch.setattr(triton, name, scaled(getattr(triton, name), 1.1))
            finding = check(operators[USED_BY.get(used_by, used_by)], device, torch.float32, "triton")
        assert finding.problem is not None, name


class Attending(torch.nn.Module):
    """Runs every operator, on layouts of its own."""

    def forward(self, x: Tensor) -> Tensor:
        q, v = x.new_ones(x.shape[0], 5, 2, 2, 4).permute(2, 0, 3, 1, 4)  # halves of one tensor
        tokens, _ = bidirectional_attention(q, v, q[:, :, :3], v[:, :, :3], need_map=False)
        bidirectional_attention(q, v, q[:, :, :3], v[:, :, :3])
        mean, variance = channel_moments(x)
        x = scale_shift(x, mean, variance, relu=True)
        x = depthwise_conv(x, x.new_ones(4, 1, 1, 3, 3))
        return depthwise_separable_conv(x, x.new_ones(4, 1, 1, 3, 3), x.new_ones(6, 4, 1, 1, 1)) + tokens.sum()


def test_layouts_of_a_network_are_those_it_calls_operators_with(triton: ModuleType, device: torch.device) -> None:
    q = ((2, 2, 5, 4), (80, 4, 16, 1))
    found = self_check.layouts_in(Attending(), (2, 4, 2, 3, 4), device, None)
    assert found["bidirectional_attention"] == {(q, q, ((2, 2, 3, 4), q[1]), ((2, 2, 3, 4), q[1]))}
    assert found["channel_moments"] == {(((2, 4, 2, 3, 4), (96, 24, 12, 4, 1)),)}
    assert ((4, 1, 1, 3, 3), (9, 9, 9, 3, 1)) in next(iter(found["depthwise_conv"]))


def test_kernels_that_are_wrong_for_the_shapes_of_a_run_alone_are_found(
    triton: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = triton.scale_shift

    def wrong(x: Tensor, *arguments: Any) -> Tensor:
        return right(x, *arguments) * (1.1 if x.shape[1:] == (4, 2, 3, 4) else 1.0)

    monkeypatch.setattr(triton, "scale_shift", wrong)
    layouts = self_check.layouts_in(Attending(), (2, 4, 2, 3, 4), device, None)["scale_shift"]
    called = frozenset(("scale_shift", of_use) for of_use in layouts)
    assert distrust_wrong_kernels(device, torch.float32) == ()
    [(operator, problem)] = distrust_wrong_kernels(device, torch.float32, called)
    assert operator == "scale_shift"
    assert "for (2, 4, 2, 3, 4), (2, 4), (2, 4)" in problem


def test_a_check_without_memory_condemns_nothing(
    triton: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton, "scale_shift", without_memory)
    with pytest.warns(RuntimeWarning, match="scale_shift could not be checked in full"):
        assert distrust_wrong_kernels(device, torch.float32) == ()
    assert "triton" not in explain(scale_shift, *example(scale_shift, device)).refusals


def test_a_run_on_a_gpu_warns_of_wrong_kernels(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    asked = []

    def found(device: torch.device, dtype: torch.dtype, layouts: object) -> tuple[tuple[str, str], ...]:
        asked.append((device, dtype, layouts))
        return (("scale_shift", "off by 1"),) if dtype == torch.bfloat16 else ()

    shapes = []

    def layouts_in(network: torch.nn.Module, shape: tuple[int, ...], *_: object) -> dict[str, set[object]]:
        shapes.append(shape)
        return {"scale_shift": {"some"}, "channel_moments": set()}

    monkeypatch.setattr(self_check, "distrust_wrong_kernels", found)
    monkeypatch.setattr(self_check, "layouts_in", layouts_in)
    gpu, network = torch.device("cuda", 0), torch.nn.Identity()
    check_kernels(network, (32, 1, 8, 8), torch.device("cpu"), torch.bfloat16)
    assert not asked
    check_kernels(network, (32, 1, 8, 8), gpu, None)
    assert asked == [(gpu, torch.float32, frozenset({("scale_shift", "some")}))]
    assert shapes == [(2, 1, 8, 8)]
    assert not recwarn
    with pytest.warns(
        RuntimeWarning, match=r"^scale_shift runs without its Triton kernels.* cuda:0 .*bfloat16: off by 1"
    ):
        check_kernels(network, (32, 1, 8, 8), gpu, torch.bfloat16)
