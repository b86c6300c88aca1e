"""A named backend runs or raises; "auto" runs what can; explain() says which and why."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from utnetv2_fast.ops import bidirectional_attention, depthwise_conv, depthwise_separable_conv, explain

CALLS: list[tuple[Callable[..., object], tuple[tuple[int, ...], ...]]] = [
    (bidirectional_attention, ((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 3, 4), (1, 2, 3, 4))),
    (depthwise_conv, ((1, 4, 6, 6), (4, 1, 3, 3))),
    (depthwise_separable_conv, ((1, 4, 6, 6), (4, 1, 3, 3), (8, 4, 1, 1))),
]
each_operator = pytest.mark.parametrize(("operator", "shapes"), CALLS, ids=[call[0].__name__ for call in CALLS])


@each_operator
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_named_backend_never_falls_back(
    operator: Callable[..., object], shapes: tuple[tuple[int, ...], ...], impl: str
) -> None:
    with pytest.raises(NotImplementedError, match=f"cannot run with impl='{impl}': .* not built"):
        operator(*map(torch.ones, shapes), impl=impl)


@each_operator
def test_an_unknown_backend_is_named(operator: Callable[..., object], shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'reference', 'cpu', 'triton', not 'cuda'"):
        operator(*map(torch.ones, shapes), impl="cuda")


@each_operator
def test_explain_agrees_with_what_runs(
    operator: Callable[..., object], shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
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
