"""`utnetv2-fast demo`: the demo dataset, of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from utnetv2_fast.cli.console import Json, console, print_json, track
from utnetv2_fast.errors import InputError


def demo(
    folder: Annotated[Path, typer.Argument(help="The dataset folder to write.", show_default=False)],
    patients: Annotated[int, typer.Option(min=2, max=9999, help="Two scans of each.")] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
) -> None:
    """Write a dataset of made-up short-axis cardiac MR scans, from four vendors that differ.

    Examples:

    utnetv2-fast demo demo-80 --patients 80
    """
    from utnetv2_fast.data.phantom import write_phantom

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; name a folder that is not.")
    dataset = write_phantom(folder, patients, seed, track)
    if json:
        print_json({"folder": str(folder), "cases": len(dataset.cases)})
        return
    console.print(f"{folder}: {len(dataset.cases)} scans of {patients} patients.", highlight=False, markup=False)
