"""`utnetv2-fast doctor`: what this machine offers, and whether the operators are right and fast on it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from utnetv2_fast.cli.console import Json, console, print_json, track

if TYPE_CHECKING:
    import torch


def doctor(
    json: Json = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the times, which take some ten seconds.")] = False,
) -> None:
    """Describe the machine, name what is known to go wrong on it, check the operators and time them.

    Says which backend runs each operator and why not the others. Exits with 1 when an operator fails or computes
    something else than its formula in float64.

    Examples:

    utnetv2-fast doctor

    utnetv2-fast doctor --quick --json
    """
    import torch

    from utnetv2_fast import health
    from utnetv2_fast.ops.extension import load_extension

    machine = health.machine()
    problems = health.known_problems(
        torch.__version__,
        health.version_of("triton"),
        cuda=torch.cuda.is_available(),
        extension=load_extension() is not None,
    )
    devices = _devices()
    operators = [row for device in devices for row in _check_operators(device)]
    cases = [] if quick else [(device, dtype) for device in devices for dtype in _dtypes(device)]
    speeds, dense = [], []
    for device, dtype in track(cases, "Timing operators"):
        speeds += list(health.speeds(device, dtype))
        where = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
        dense.append(where | {"gflops": round(health.dense_conv_speed(device, dtype) / 1e9)})
    if json:
        print_json(
            {
                "machine": machine,
                "known_problems": problems,
                "operators": operators,
                "speeds": [asdict(speed) for speed in speeds],
                "dense_convolution": dense,
            }
        )
    else:
        for key, value in machine.items():
            console.print(f"{key.replace('_', ' ')}: {value}", highlight=False, soft_wrap=True)
        for problem in problems:
            console.print(f"[yellow]known problem:[/yellow] {escape(problem)}", highlight=False, soft_wrap=True)
        _print_operators(operators)
        if speeds:
            table = Table("operator", "device", "dtype", "backend", "ms", "plain PyTorch", title="Forward and backward")
            for s in speeds:
                ratio = f"{s.reference_milliseconds / s.milliseconds:.1f} x as long"
                table.add_row(s.operator, s.device, s.dtype, s.backend, f"{s.milliseconds:.2f}", ratio)
            console.print(table)
        for row in dense:
            said = f"dense 3D convolution on {row['device']} in {row['dtype']}: {row['gflops']} GFLOP/s"
            console.print(said, highlight=False, soft_wrap=True)
    if not all(row["right"] for row in operators):
        raise typer.Exit(1)


def _print_operators(operators: list[dict[str, Any]]) -> None:
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


def _devices() -> list[torch.device]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """float32, and the dtype that networks run in by default where that is another."""
    import torch

    from utnetv2_fast.devices import autocast_dtype

    own = autocast_dtype(device)
    return [torch.float32] if own is None else [torch.float32, own]


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
