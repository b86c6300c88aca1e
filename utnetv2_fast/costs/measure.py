"""Times and peaks of memory of work on a device, and work in fresh processes."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from utnetv2_fast.errors import RunError
from utnetv2_fast.memory import keep_freed_memory, largest_size

Run = Callable[[], object]

_SECONDS = 0.5  # of repeating a piece of work
_MOST_REPEATS = 20


def seconds(run: Run, device: torch.device) -> float:
    """The time that one call takes."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def shortest(run: Run, device: torch.device) -> float:
    """The shortest time of some calls, because whatever else the machine does only adds; the first is not counted."""
    run()
    first = seconds(run, device)
    more = min(_MOST_REPEATS, math.ceil(_SECONDS / max(first, 1e-6)))
    return min([first, *(seconds(run, device) for _ in range(more))])


class PeakMemory:
    """The most memory, beyond that of its making, that has been taken since: of a GPU, else of this process.

    A process's largest size never falls: where work has taken more before, less does not show.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cpu":
            keep_freed_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._before = self._now()

    def _now(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return largest_size() if self._device.type == "cpu" else None

    def taken(self) -> int | None:
        """In bytes; None where it is unknown."""
        now = self._now()
        return None if now is None or self._before is None else now - self._before


def in_a_process(module: str, function: str, *arguments: object) -> Any:
    """What that function of a module returns (JSON types), called with plain arguments in a fresh process.

    Raises RunError when that process fails or is killed.
    """
    code = f"import json, {module}; print(json.dumps({module}.{function}(*{arguments!r})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RunError(f"{_how_it_ended(result)}; a smaller batch or size takes less memory.")
    return json.loads(result.stdout)


def _how_it_ended(result: subprocess.CompletedProcess[str]) -> str:
    if result.returncode < 0:
        return f"The process that measures was ended by {signal.Signals(-result.returncode).name}"
    lines = result.stderr.strip().splitlines()  # the last line of a traceback is what was raised
    why = lines[-1].rstrip(".") if lines else f"it ended with {result.returncode}"
    return f"The process that measures failed: {why}"
