"""Which backend runs an operator on given tensors, and why the others do not.

Everything here is plain Python on dtypes, shapes and devices, so that Dynamo traces it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "cpu", "triton"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("triton", "cpu", "reference")  # fastest first


def refusal(backend: str, operator: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why `backend` cannot run `operator` on `tensors`; None when it can."""
    if backend == "triton":
        return "the Triton kernels are not built in this version"
    if backend == "cpu":
        return "the C++ kernels are not built in this version"
    return None


def choose(operator: str, impl: str, tensors: tuple[Tensor, ...]) -> str:
    """The backend that runs: the fastest that can for "auto", else the one named.

    Raises ValueError for an unknown name and NotImplementedError when the named backend cannot run these tensors.
    """
    if impl == "auto":
        for backend in BACKENDS:
            if refusal(backend, operator, tensors) is None:
                return backend
    if impl not in BACKENDS:
        raise ValueError(f"impl must be one of 'auto', 'reference', 'cpu', 'triton', not {impl!r}")
    reason = refusal(impl, operator, tensors)
    if reason is not None:
        raise NotImplementedError(f"{operator} cannot run with impl={impl!r}: {reason}")
    return impl


@dataclass(frozen=True)
class Explanation:
    """What `impl="auto"` does: the backend that runs, and for each faster or slower one that cannot, the reason."""

    operator: str
    backend: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator} runs with impl={self.backend!r}"]
        return "\n".join(lines + [f"  not {backend!r}: {reason}" for backend, reason in self.refusals.items()])


def explain(operator: str | Callable[..., Any], *tensors: Tensor) -> Explanation:
    """Tell which backend would run `operator` (a name or the function itself) on `tensors`, its tensor arguments."""
    name = operator if isinstance(operator, str) else operator.__name__
    if name not in OPERATORS:
        raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, not {name!r}")
    reasons = {backend: refusal(backend, name, tensors) for backend in BACKENDS}
    return Explanation(
        operator=name,
        backend=choose(name, "auto", tensors),
        refusals={backend: reason for backend, reason in reasons.items() if reason is not None},
    )


OPERATORS = ("bidirectional_attention", "depthwise_conv", "depthwise_separable_conv")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast, if it is on for the device of `x`, lowers floating inputs other than float64."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as autocast would pass it to an operator that runs in `dtype`."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)
