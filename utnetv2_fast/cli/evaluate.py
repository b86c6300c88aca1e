"""`utnetv2-fast evaluate`: predicted label maps scored against reference ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from utnetv2_fast.cli.console import Json, console, print_json, track
from utnetv2_fast.errors import InputError
from utnetv2_fast.ranks import ranks_of_this_job

if TYPE_CHECKING:
    from utnetv2_fast.evaluation.metrics import Evaluation
    from utnetv2_fast.training import RunFolder


def evaluate(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="PREDICTIONS REFERENCES | RUN...",
            help="The folder of label maps to score, and a dataset folder or its folder of label maps (dataset.json "
            "beside it); or the run folders of several folds, whose scores are gathered.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Where scores.csv and scores.json go.", show_default="the predictions; of runs, nowhere"
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="What NSD forgives, in mm.")] = 1.0,
    missing_class: Annotated[
        Literal["diagonal", "500mm"], typer.Option(help="The rule for a class that is absent from a label map.")
    ] = "diagonal",
    subset: Annotated[bool, typer.Option("--subset", help="Leave references without a prediction out.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="An HTML page to write, with pictures of cases.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Dice, HD95 and NSD per case and class, on the scans' own grids; or those of all folds of a dataset together.

    A class absent from both label maps of a case is not counted there; absent from one of them: Dice 0, NSD 0, and as
    HD95 the diagonal of the scan. By the rule 500mm, that of the paper's authors, one that only the prediction has is
    not counted either, and HD95 is at most 500 mm, which is that of a missed class. Runs keep the rule that they were
    scored by. Started by torchrun or srun, the processes share the cases.

    Examples:

    utnetv2-fast evaluate predictions/ data/acdc --subset

    utnetv2-fast evaluate predictions/ data/acdc --report acdc.html

    utnetv2-fast evaluate predictions/ data/bcv --missing-class 500mm

    utnetv2-fast evaluate runs/acdc-fold0 runs/acdc-fold1 runs/acdc-fold2
    """
    from utnetv2_fast.evaluation.metrics import evaluate_folder
    from utnetv2_fast.evaluation.tables import summarise, write_tables
    from utnetv2_fast.training.run_folder import find_runs

    ranks = ranks_of_this_job()
    if runs := {run.path.resolve(): run for folder in folders for run in find_runs(folder)}:
        if report is not None:
            raise InputError("--report needs one folder of label maps; each run has a report.html of its own.")
        if missing_class != "diagonal":
            raise InputError("--missing-class needs a folder of label maps; runs are scored already, by their recipe.")
        if ranks.first:
            _gather(list(runs.values()), out, json)
        return
    if len(folders) != 2:
        raise InputError("Give a folder of label maps and that of their references, or the folders of finished runs.")
    predictions, references = folders
    evaluation = evaluate_folder(
        predictions,
        references,
        track,
        tolerance=tolerance,
        missing_class=missing_class,
        subset=subset,
        folder=out,
        ranks=ranks,
    )
    if not ranks.first:
        return
    write_tables(evaluation, out or predictions)
    if report is not None:
        from utnetv2_fast.evaluation.report import report_on_folder, write_report

        write_report(report, report_on_folder(evaluation, predictions, references))
    if json:
        print_json(summarise(evaluation))
    else:
        console.print(score_table(evaluation))


def _gather(runs: Sequence[RunFolder], out: Path | None, json: bool) -> None:
    """Show the scores of several runs' held-out scans together, and write them to `out`."""
    from utnetv2_fast.evaluation.folds import pool_folds, spread_over_folds
    from utnetv2_fast.evaluation.tables import read_tables, summarise, write_tables

    folds = {run.path: read_tables(run.validation_folder) for run in runs}
    pooled, spread = pool_folds(folds), spread_over_folds(list(folds.values()))
    if out is not None:
        write_tables(pooled, out)
    if json:
        scores = {str(path): summarise(fold) for path, fold in folds.items()}
        print_json({"runs": scores, "folds": spread, "pooled": summarise(pooled)})
        return
    console.print(score_table(pooled))
    console.print(folds_table(folds, spread))


def folds_table(folds: Mapping[Path, Evaluation], spread: Mapping[str, Mapping[str, float]]) -> Table:
    """Each fold's mean over its classes, and the mean and deviation of these, for the screen."""
    table = Table("fold", "Dice", "HD95 (mm)", "NSD", "cases")
    digits = {"dice": 3, "hd95": 2, "nsd": 3}
    for path, fold in folds.items():
        means = (_spread(fold.mean(metric), math.nan, n) for metric, n in digits.items())
        table.add_row(escape(str(path)), *means, str(len(fold.cases)))
    table.add_section()
    cases = sum(len(fold.cases) for fold in folds.values())
    over_folds = (_spread(spread[metric]["mean"], spread[metric]["std"], n) for metric, n in digits.items())
    table.add_row("mean", *over_folds, str(cases))
    return table


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
