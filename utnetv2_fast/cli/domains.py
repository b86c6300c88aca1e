"""`utnetv2-fast domains`: the scores of finished runs by vendor, centre or anything else that is known of a case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from utnetv2_fast.cli import study
from utnetv2_fast.cli.console import Json
from utnetv2_fast.errors import InputError


def domains(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of studies or of finished runs of one dataset.", show_default=False)
    ],
    by: Annotated[str, typer.Option(help="A column of the dataset's cases.csv.")] = "vendor",
    data: Annotated[
        Path | None, typer.Option(help="The dataset, where it has moved.", show_default="where the runs say")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the page goes.", show_default="FOLDER/domains-COLUMN")
    ] = None,
    json: Json = False,
) -> None:
    """Split the scores of the held-out cases by a column of cases.csv, and mark what no training has seen.

    Nothing is predicted again. The figure has the form of the paper's Fig. 2D.

    Examples:

    utnetv2-fast domains studies/curve --by vendor

    utnetv2-fast domains runs/acdc runs/acdc-resunet --by centre --json
    """
    from utnetv2_fast.study.folder import StudyFolder
    from utnetv2_fast.study.report import split_by
    from utnetv2_fast.study.results import read_results
    from utnetv2_fast.training.run_folder import find_runs

    runs = [run for folder in folders for run in (find_runs(folder) or StudyFolder(folder).runs())]
    results = read_results(runs)
    if not results:
        raise InputError(f"{folders[0]}: holds no finished run; name the folder of a study or of runs.")
    if out is None and not by.isidentifier():
        raise InputError(f"--by {by}: cannot be part of a folder's name; give --out too.")
    study.present(split_by(results, by, data), results, out or folders[0] / f"domains-{by}", json=json)
