"""`utnetv2-fast convert`: a public dataset's own layout into the one that the other verbs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from utnetv2_fast.cli.console import Json, console, print_json, track


def convert(
    layout: Annotated[Literal["acdc"], typer.Argument(help="The layout of SOURCE.", show_default=False)],
    source: Annotated[Path, typer.Argument(help="The dataset as downloaded and unpacked.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    json: Json = False,
) -> None:
    """Copy a public dataset into an nnU-Net raw folder, with the patient of every case in cases.csv.

    Example: utnetv2-fast convert acdc downloads/ACDC/database data/acdc
    """
    from utnetv2_fast.data.convert import convert_acdc

    dataset = convert_acdc(source, destination, track)
    patients = len({case.patient for case in dataset.cases})
    if json:
        print_json({"folder": destination, "layout": layout, "cases": len(dataset.cases), "patients": patients})
    else:
        console.print(f"{destination}: {len(dataset.cases)} cases of {patients} patients.", highlight=False)
