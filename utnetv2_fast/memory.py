"""Memory of this process: what the C library does with it when tensors are freed, and the most that was taken."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
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
    """The most bytes that this process has taken, of the machine's memory and of a GPU's; None where unknown.

    So far, or since `forget_peak_memory`.
    """
    import torch

    gpu = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {"peak_memory_bytes": largest_size(), "peak_gpu_memory_bytes": gpu}


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` speak of what follows, as far as the system can: the machine's memory on Linux, a GPU's."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def largest_size() -> int | None:
    """Bytes that this process had in memory at most, without what it inherited; None where unknown."""
    status = Path("/proc/self/status")
    if not status.exists():
        return _peak_resident_bytes()
    # Linux lets a process inherit ru_maxrss from its parent.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
