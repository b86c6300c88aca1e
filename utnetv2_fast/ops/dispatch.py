"""Which backend runs an operator on given tensors, and why the others do not.

Everything here is plain Python on dtypes, shapes and devices, so that Dynamo traces it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from utnetv2_fast.ops import cpu, reference
from utnetv2_fast.ops.extension import load_extension

Impl = Literal["auto", "reference", "cpu", "triton"]
BACKENDS = ("triton", "cpu", "reference")  # fastest first
# What the Triton kernels hold on chip.
MAP_TOKENS_OF_TRITON = 128
HEAD_CHANNELS_OF_TRITON = 512
TAPS_OF_TRITON = 343

OPERATORS = (
    "bidirectional_attention",
    "channel_moments",
    "dense_conv",
    "dense_conv_backward_weight",
    "depthwise_conv",
    "depthwise_separable_conv",
    "scale_shift",
)


def refusal(backend: str, operator: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why `backend` cannot run `operator` on `tensors`; None when it can."""
    if backend == "triton":
        return _refused_by_triton(operator, tensors)
    if backend == "cpu":
        elsewhere = next((t.device for t in tensors if t.device.type != "cpu"), None)
        if elsewhere is not None:
            return f"it computes on the CPU, and these tensors are on {elsewhere}"
        if operator == "dense_conv" and (reason := _torch_convolves_better(*tensors)) is not None:
            return reason
        if operator == "dense_conv_backward_weight" and (reason := _torch_is_as_fast(*tensors)) is not None:
            return reason
        return _extension_is_missing()
    return None


def _torch_convolves_better(x: Tensor, weight: Tensor) -> str | None:
    """Why a dense convolution is torch's, tap by tap; None where Winograd's filtering is faster."""
    if (reason := cpu.why_not_winograd(weight, x)) is not None:
        return reason
    if x.dtype != torch.float32:
        return f"its kernel computes in float32, and these tensors are {x.dtype}"
    if (channels := min(weight.shape[:2])) < cpu.CHANNELS_OF_WINOGRAD:
        return f"its kernel pays from {cpu.CHANNELS_OF_WINOGRAD} channels on either side, and there are {channels}"
    return None


def _torch_is_as_fast(grad_out: Tensor, x: Tensor, weight: Tensor) -> str | None:
    """Why the weight's gradient of a dense convolution needs no kernel of ours; None where it does.

    Where the convolution runs by Winograd's filtering its gradient does. Beside the kernel that goes tap by tap: oneDNN
    has none for float64 and float16. Its others are at their best where the processor has instructions for the dtype:
    in bfloat16 five times as fast as ours with AMX, in float32 with AVX-512 1.1 times, in the layout of either.
    With AVX2 they run at a fraction of the processor's speed in bfloat16, and on channels-last maps in float32.
    """
    if cpu.why_not_winograd(weight, grad_out) is None and _torch_convolves_better(x, weight) is None:
        return None
    if x.dtype in (torch.float32, torch.float64) and all(k == 1 for k in weight.shape[2:]):
        return "with a kernel of one tap this is a product of matrices, which torch has from BLAS"
    if x.dtype in (torch.float32, torch.bfloat16) and _processor_multiplies_wide(x.dtype):
        return f"torch's own kernel is as fast where the processor has AVX-512 for {x.dtype}"
    if x.dtype == torch.float32 and grad_out.stride(1) != 1 and x.stride(1) != 1:
        return "torch's own kernel is as fast on channels-first maps in float32"
    return None


def _processor_multiplies_wide(dtype: torch.dtype) -> bool:
    """Whether it multiplies `dtype`, bfloat16 or float32, by instructions of AVX-512."""
    return torch.cpu._is_avx512_bf16_supported() if dtype == torch.bfloat16 else torch.cpu._is_avx512_supported()


def _extension_is_missing() -> str | None:
    if load_extension() is None:
        return "the C++ extension is not built: install a C++17 compiler, then install utnetv2-fast again"
    return None


def _refused_by_triton(operator: str, tensors: tuple[Tensor, ...]) -> str | None:
    x = tensors[0]
    if operator.startswith("dense_conv"):
        return "it has no kernel for dense convolutions: on a GPU torch's own are the fast ones"
    if (operator, str(x.device), x.dtype) in _distrusted:
        return f"its results were found wrong on {x.device} in {x.dtype} (`utnetv2-fast doctor` shows them)"
    if (reason := _triton_is_missing_on(str(x.device))) is not None:
        return reason
    if x.dtype == torch.float64:
        return "its kernels compute in float32, and these tensors are float64"
    if operator == "bidirectional_attention" and (l := tensors[2].shape[2]) > MAP_TOKENS_OF_TRITON:
        return f"its kernels hold a semantic map of at most {MAP_TOKENS_OF_TRITON} tokens, and map_q has {l}"
    if operator == "bidirectional_attention" and (d := x.shape[3]) > HEAD_CHANNELS_OF_TRITON:
        return f"its kernels take heads of at most {HEAD_CHANNELS_OF_TRITON} channels, and q has {d}"
    if operator.startswith("depthwise") and (taps := math.prod(tensors[1].shape[2:])) > TAPS_OF_TRITON:
        return f"its kernels take convolutions of at most {TAPS_OF_TRITON} taps, and the weight has {taps}"
    return None


def _triton_is_missing_on(device: str) -> str | None:
    """Why no Triton kernel can run on `device`, whatever the operator."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    kind = torch.device(device).type
    if interprets_triton():
        return None if kind == "cpu" else f"its interpreter (TRITON_INTERPRET=1) works on the CPU, not on {device}"
    if kind != "cuda":
        return f"it computes on a GPU, and these tensors are on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"its kernels need a GPU of compute capability 8.0 or newer, and {name} is older"
    return None


def interprets_triton() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of the CPU: for tests, never chosen by "auto"."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_distrusted: set[tuple[str, str, torch.dtype]] = set()


def distrust_triton(operator: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse the Triton kernels of `operator` on this device in this dtype from now on: a check found them wrong."""
    _distrusted.add((operator, str(device), dtype))


# What `torch.compiler.assume_constant_result` does, without importing Dynamo, and Triton with it, for it.
_processor_multiplies_wide._dynamo_marked_constant = True  # type: ignore[attr-defined]
_extension_is_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_triton_is_missing_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def implementation(backend: str) -> ModuleType:
    """The module that holds the operators of `backend`."""
    if backend == "triton":
        return importlib.import_module("utnetv2_fast.ops.triton")
    return {"reference": reference, "cpu": cpu}[backend]


def choose(operator: str, impl: str, tensors: tuple[Tensor, ...]) -> str:
    """The backend that runs: the fastest that can for "auto", else the one named.

    Raises ValueError for an unknown name and NotImplementedError when the named backend cannot run these tensors.
    """
    if impl == "auto":
        # On a CPU Triton could only be interpreted.
        backends = BACKENDS[1:] if tensors[0].device.type == "cpu" else BACKENDS
        return next(backend for backend in backends if refusal(backend, operator, tensors) is None)
    if impl not in BACKENDS:
        raise ValueError(f"impl must be one of 'auto', 'reference', 'cpu', 'triton', not {impl!r}")
    reason = refusal(impl, operator, tensors)
    if reason is not None:
        raise NotImplementedError(f"{operator} cannot run with impl={impl!r}: {reason}")
    return impl


@dataclass(frozen=True)
class Explanation:
    """What `impl="auto"` does: the backend that runs, and the reason of each that cannot."""

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
