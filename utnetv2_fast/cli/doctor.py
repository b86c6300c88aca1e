"""`utnetv2-fast doctor`: what this machine offers, which backend each operator takes here, and whether it is right."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from utnetv2_fast.cli.console import Json, console, print_json

if TYPE_CHECKING:
    import torch

GIB = 2**30


def doctor(json: Json = False) -> None:
    """Describe the machine, say which backend runs each operator and why not the others, and check their results.

    Exits with 1 when an operator fails or computes something else than its formula in float64.

    Examples:

    utnetv2-fast doctor

    utnetv2-fast doctor --json
    """
    machine = _machine()
    operators = [row for device in _devices() for row in _check_operators(device)]
    if json:
        print_json({"machine": machine, "operators": operators})
    else:
        for key, value in machine.items():
            console.print(f"{key.replace('_', ' ')}: {value}", highlight=False, soft_wrap=True)
        table = Table("operator", "device", "dtype", "backend", "error", "result")
        for row in operators:
            error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            verdict = "right" if row["right"] else f"WRONG: {row['problem']}"
            table.add_row(row["operator"], row["device"], row["dtype"], row["backend"], error, escape(verdict))
        console.print(table)
        # Operators that are refused for the same reason share a line.
        refused: dict[str, list[str]] = {}
        for row in operators:
            for backend, reason in row["refusals"].items():
                names = refused.setdefault(f"not {backend} on {row['device']}: {reason}", [])
                names += [row["operator"]] * (row["operator"] not in names)
        for reason, names in refused.items():
            console.print(f"{reason} ({', '.join(names)})", highlight=False, soft_wrap=True)
    if not all(row["right"] for row in operators):
        raise typer.Exit(1)


def _machine() -> dict[str, Any]:
    import torch

    from utnetv2_fast.ops.extension import load_extension

    extension = load_extension()
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if extension is None:
        machine["cpp_extension"] = "not built: install a C++17 compiler, then install utnetv2-fast again"
    else:
        used, widest = extension.instruction_set(), extension.widest_instruction_set()
        note = "the widest here" if used == widest else f"although {widest} is here"
        machine["cpp_extension"] = f"{used} instructions, {note}; {extension.thread_count()} threads"
    machine |= {f"gpu_{i}": _describe_gpu(i) for i in range(torch.cuda.device_count())} or {"gpu": "none"}
    if (memory := _memory_gib()) is not None:
        machine["memory_gib"] = memory
    machine["free_disk_here_gib"] = round(shutil.disk_usage(Path.cwd()).free / GIB, 1)
    return machine


def _describe_gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / GIB:.0f} GiB"


def _memory_gib() -> float | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, others may lack these names
        return None


def _devices() -> list[torch.device]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _check_operators(device: torch.device) -> list[dict[str, Any]]:
    import torch

    from utnetv2_fast.ops.dispatch import explain
    from utnetv2_fast.ops.self_check import EXAMPLES, check, example

    rows = []
    for operator in EXAMPLES:
        for dtype in (torch.float32, torch.bfloat16):
            explanation = explain(operator, *example(operator, device, dtype))
            finding = check(operator, device, dtype)
            rows.append(
                {
                    "operator": explanation.operator,
                    "device": str(device),
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": explanation.backend,
                    "refusals": explanation.refusals,
                    "relative_error": finding.error,
                    "right": finding.problem is None,
                    "problem": finding.problem,
                }
            )
    return rows
