"""`utnetv2-fast evaluate`: predicted label maps scored against reference ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from utnetv2_fast.cli.console import Json, console, print_json, track

if TYPE_CHECKING:
    from utnetv2_fast.evaluation.metrics import Evaluation


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="The folder of label maps to score.", show_default=False)],
    references: Annotated[
        Path,
        typer.Argument(
            help="A dataset folder, or its folder of label maps (dataset.json beside it).", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where scores.csv and scores.json go.", show_default="the predictions"),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="What NSD forgives, in mm.")] = 1.0,
    subset: Annotated[bool, typer.Option("--subset", help="Leave references without a prediction out.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="An HTML page to write, with pictures of cases.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Dice, HD95 and NSD per case and class, on the scans' own grids.

    A class absent from both label maps of a case is not counted there; absent from one of them: Dice 0, NSD 0, and as
    HD95 the diagonal of the scan.

    Examples:

    utnetv2-fast evaluate predictions/ data/acdc --subset

    utnetv2-fast evaluate predictions/ data/acdc --report acdc.html
    """
    from utnetv2_fast.evaluation.metrics import evaluate_folder
    from utnetv2_fast.evaluation.tables import summarise, write_tables

    evaluation = evaluate_folder(predictions, references, track, tolerance=tolerance, subset=subset)
    write_tables(evaluation, out or predictions)
    if report is not None:
        from utnetv2_fast.evaluation.report import report_on_folder, write_report

        write_report(report, report_on_folder(evaluation, predictions, references))
    if json:
        print_json(summarise(evaluation))
    else:
        console.print(score_table(evaluation))


def score_table(evaluation: Evaluation) -> Table:
    """The classes' means and deviations over the cases, for the screen."""
    table = Table("class", "Dice", "HD95 (mm)", f"NSD ({evaluation.tolerance:g} mm)", "cases")
    for label in evaluation.labels:
        dice, hd95, nsd = (evaluation.summary(label, metric) for metric in ("dice", "hd95", "nsd"))
        table.add_row(
            label,
            _spread(dice.mean, dice.std, 3),
            _spread(hd95.mean, hd95.std, 2),
            _spread(nsd.mean, nsd.std, 3),
            str(dice.cases),
        )
    table.add_section()
    means = [evaluation.mean(metric) for metric in ("dice", "hd95", "nsd")]
    cases = len({score.case for score in evaluation.scores})
    table.add_row("mean", *(_spread(m, math.nan, d) for m, d in zip(means, (3, 2, 3), strict=True)), str(cases))
    return table


def _spread(mean: float, std: float, digits: int) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")
