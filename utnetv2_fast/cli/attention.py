"""`utnetv2-fast attention`: what a trained network's semantic tokens attend to in a scan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Column, Table

from utnetv2_fast.cli.console import Json, console, print_json, track


def attention(
    run: Annotated[Path, typer.Argument(help="A run folder of UTNetV2.", show_default=False)],
    inputs: Annotated[
        list[Path],
        typer.Option("--input", "-i", help="Scans, as `predict` takes them.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write CASE/ to.", show_default=False)],
    level: Annotated[
        list[str] | None,
        typer.Option(
            help="encoder-2, ..., decoder-3: every block of these stages.", show_default="the last block of each stage"
        ),
    ] = None,
    weights: Annotated[
        Literal["last", "best"], typer.Option(help="The network at the end of training, or at its best validation.")
    ] = "last",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    json: Json = False,
) -> None:
    """Show with which weights each semantic token aggregates a scan, and how alike the tokens are.

    For every scan OUT/CASE/ gets overview.png (the tokens most on each class), STAGE-blockN.png (every head and token),
    similarity.png (cosines between the tokens, beside those of average pooling), attention.json and attention.csv (the
    share of each token's weight on each predicted class). Shown is the slice with most foreground, in the window
    around it.

    Examples:

    utnetv2-fast attention runs/acdc -i scan.nii.gz -o attention/

    utnetv2-fast attention runs/acdc -i scans/ -o attention/ --level encoder-3 --level decoder-3
    """
    from utnetv2_fast.attention_report import write_inspection
    from utnetv2_fast.data.dataset import list_scans
    from utnetv2_fast.inference.predict import Predictor
    from utnetv2_fast.inspection import choose_stages, inspect_case, summarise
    from utnetv2_fast.memory import keep_freed_memory

    keep_freed_memory()
    predictor = Predictor.load([run], weights=weights, device=device)
    stages = choose_stages(predictor.models[0], level or [])
    found = []
    for case in track(list_scans(inputs, len(predictor.plan.channels)), "Looking"):
        inspection = inspect_case(predictor, case)
        write_inspection(inspection, out / case.name, stages)
        found.append(summarise(inspection))
    if json:
        print_json({"cases": found})
        return
    for summary in found:
        console.print(_table(summary))
    console.print(f"{out}: figures and numbers of {len(found)} scans.", markup=False, highlight=False, soft_wrap=True)


def _table(summary: Mapping[str, Any]) -> Table:
    """A row per block: mean cosine of its tokens and of average pooling, and the largest share on each class."""
    headers = ("stage", "block", "cosine", "pooled", *map(escape, summary["area"]))
    table = Table(
        *(Column(header, justify="right" if number else "left", no_wrap=True) for number, header in enumerate(headers)),
        box=SIMPLE,
        padding=0,
        title=f"{escape(summary['case'])}: how alike the tokens are, and the most that one has on each class",
    )
    for block in summary["blocks"]:
        largest = [_percent(max(token["shares"][name] for token in block["tokens"])) for name in summary["area"]]
        table.add_row(
            block["stage"],
            str(block["block"]),
            *("-" if mean is None else f"{mean:.2f}" for mean in block["similarity"].values()),
            *largest,
        )
    table.add_section()
    table.add_row("even average", "", "", "", *map(_percent, summary["area"].values()))
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
