"""What benchmarks of operators and of networks share: the machine, times taken in turn, the roof, plain tables."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from utnetv2_fast.costs.measure import in_a_process, seconds
from utnetv2_fast.memory import keep_freed_memory, largest_size
from utnetv2_fast.ops.extension import load_extension

__all__ = ["Roof", "in_a_process", "largest_size", "machine", "measure_roof", "seconds", "shortest", "table"]

Run = Callable[[], object]


def machine() -> dict[str, str]:
    """What a figure depends on, as it stands when called."""
    extension = load_extension()
    system = {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "kernels": "not built" if extension is None else extension.instruction_set(),
        "freed memory": "kept" if keep_freed_memory() else "returned",
    }
    if torch.cuda.is_available():
        system["gpu"] = torch.cuda.get_device_name()
    return system | {
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = fields.get("model name", platform.machine())
    return f"{model} (family {fields['cpu family']} model {fields['model']})" if "cpu family" in fields else model


def _commit() -> str:
    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def shortest(runs: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """Each run's shortest time of `rounds` rounds in which all take turns, so that drift of the machine meets all.

    The shortest, because whatever else the machine does only adds.
    """
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run, device))
    return best


@dataclass(frozen=True)
class Roof:
    """The most that the machine does, as measured: operations of matrix products, bytes of copies, per second."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bytes_moved: float) -> float:
        """The least time in which this much can be done."""
        return max(flops / self.flops, bytes_moved / self.bytes)


def measure_roof(dtype: torch.dtype, device: torch.device) -> Roof:
    size, channels, positions = 2048, 64, (16, 96, 96)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    x = torch.randn(1, channels, *positions, device=device).to(dtype)
    weight = torch.randn(channels, channels, 3, 3, 3, device=device).to(dtype)
    source = torch.randn(64 << 20, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {
        "product": lambda: a @ b,
        "convolution": lambda: F.conv3d(x, weight, padding=1),
        "copy": lambda: target.copy_(source),
    }
    shortest(runs, 2, device)
    best = shortest(runs, 8, device)
    convolution_flops = 2 * 27 * channels * x.numel()
    return Roof(
        flops=max(2 * size**3 / best["product"], convolution_flops / best["convolution"]),
        bytes=2 * source.nbytes / best["copy"],
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    words = [any(any(map(str.isalpha, row[i])) for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if left else c.rjust(w) for c, w, left in zip(cells, widths, words, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if left else ":") for w, left in zip(widths, words, strict=True)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
