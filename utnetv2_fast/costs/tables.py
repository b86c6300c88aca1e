"""Costs as rows of text, for the terminal and for Markdown, and as the lines of a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from utnetv2_fast.costs.networks import NetworkCost
from utnetv2_fast.costs.operators import Growth

Rows = list[list[str]]
"""The first is the header."""


def network_rows(costs: Sequence[NetworkCost]) -> Rows:
    """A row per network; columns of what was measured of none are left out."""
    columns = {
        "params M": [_scaled(cost.parameters, 1e6, ".2f") for cost in costs],
        "GFLOP": [_scaled(cost.flops, 1e9, ".2f") for cost in costs],
        "forward ms": [_scaled(cost.forward_seconds, 1e-3, ".0f") for cost in costs],
        "step ms": [_scaled(cost.step_seconds, 1e-3, ".0f") for cost in costs],
        "peak GiB": [_scaled(cost.peak_bytes, 2**30, ".2f") for cost in costs],
        "remark": [_remark(cost) for cost in costs],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    cells = zip(*kept.values(), strict=True)
    return [["network", *kept], *([cost.title, *row] for cost, row in zip(costs, cells, strict=True))]


def operator_rows(growths: Sequence[Growth]) -> Rows:
    """A row per operator: parameters and powers of n, as measured and as the paper has them."""
    largest = max(growth.positions[-1] for growth in growths)
    header = ["layer", "params", "paper's", "up to n", "time ~ n^", "memory ~ n^", "formula ~ n^", "formula"]
    rows = []
    for growth in growths:
        exponents = growth.exponents
        side = math.isqrt(growth.positions[-1])
        rows.append(
            [
                growth.title,
                str(growth.parameters),
                f"{growth.parameters_as} = {growth.paper_parameters}",
                f"{side}²" + (", stopped" if growth.positions[-1] < largest else ""),
                *("-" if math.isnan(exponents[name]) else f"{exponents[name]:.2f}" for name in exponents),
                growth.formula,
            ]
        )
    return [header, *rows]


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as CSV, a column per field; what is None is left empty."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def growth_records(growths: Sequence[Growth]) -> list[dict[str, Any]]:
    """One record per operator and size."""
    return [
        {"operator": growth.operator, "positions": n, "seconds": took, "bytes": size, "paper_operations": operations}
        for growth in growths
        for n, took, size, operations in zip(
            growth.positions, growth.seconds, growth.bytes, growth.operations, strict=True
        )
    ]


def _scaled(value: float | None, unit: float, digits: str) -> str:
    return "" if value is None else f"{value / unit:{digits}}"


def _remark(cost: NetworkCost) -> str:
    if cost.problem is None:
        return ""
    return "needs monai" if "monai" in cost.problem.lower() else cost.problem
