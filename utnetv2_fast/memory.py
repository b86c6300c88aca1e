"""Memory of this process: what the C library does with it when tensors are freed, and the most that was taken."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; returns whether that can be had here.

    By default the C library returns large blocks to the system, and a training step on a CPU then spends much of its
    time on fresh pages. Once told, a process never shrinks again before it ends. Needs the C++ extension and glibc.
    """
    from utnetv2_fast.ops.extension import load_extension

    extension = load_extension()
    return extension is not None and extension.keep_freed_memory()


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most bytes that this process has taken so far, of the machine's memory and of a GPU's; None where unknown."""
    import torch

    gpu = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {"peak_memory_bytes": _peak_resident_bytes(), "peak_gpu_memory_bytes": gpu}


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
