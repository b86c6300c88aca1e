"""`utnetv2-fast verify`: every problem of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from utnetv2_fast.cli.console import Json, console, print_json, track


def verify(
    dataset: Annotated[Path, typer.Argument(help="The folder that holds dataset.json.", show_default=False)],
    json: Json = False,
) -> None:
    """Read every file of a dataset and list all that is wrong with it.

    Exits with 0 when the dataset can be used and with 2 when it cannot.

    Example: utnetv2-fast verify data/hippocampus
    """
    from utnetv2_fast.data.dataset import inspect_dataset
    from utnetv2_fast.data.verify import find_problems

    content, problems = inspect_dataset(dataset)
    problems += find_problems(content, track)
    if json:
        print_json({"dataset": content.name, "cases": len(content.cases), "problems": problems})
    else:
        for problem in problems:
            console.print(problem, markup=False, highlight=False, soft_wrap=True)
        patients = len({case.patient for case in content.cases})
        found = f"{len(problems)} problem(s)" if problems else "no problem"
        console.print(f"{content.name}: {len(content.cases)} cases of {patients} patients, {found}.", highlight=False)
    if problems:
        raise typer.Exit(2)
