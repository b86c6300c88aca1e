"""The files of `cost`: tables as CSV and Markdown, and their figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from utnetv2_fast.costs.figures import draw_networks, draw_operators
from utnetv2_fast.costs.networks import NetworkCost, as_json
from utnetv2_fast.costs.operators import Growth
from utnetv2_fast.costs.tables import Rows, csv_text, growth_records, network_rows, operator_rows
from utnetv2_fast.evaluation.figures import png, write_png
from utnetv2_fast.evaluation.tables import markdown_table
from utnetv2_fast.files import write_text_atomically


def write_networks(costs: Sequence[NetworkCost], folder: Path, scores: Mapping[str, float] | None = None) -> None:
    """`networks.csv`, `networks.md` and, with `scores` {network: Dice} of some of them, `networks.png`."""
    write_text_atomically(folder / "networks.csv", csv_text(as_json(costs)))
    write_text_atomically(folder / "networks.md", _markdown(network_rows(costs)))
    if scores is not None:
        write_png(folder / "networks.png", png(draw_networks(costs, scores)))


def write_operators(growths: Sequence[Growth], folder: Path) -> None:
    """`operators.csv` with every size, `operators.md` with the powers, `operators.png`."""
    write_text_atomically(folder / "operators.csv", csv_text(growth_records(growths)))
    write_text_atomically(folder / "operators.md", _markdown(operator_rows(growths)))
    write_png(folder / "operators.png", png(draw_operators(growths)))


def _markdown(rows: Rows) -> str:
    header, *others = rows
    return markdown_table(header, others)
