"""`utnetv2-fast convert`: a public dataset's own layout into the one that the other verbs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from utnetv2_fast.cli.console import Json, console, print_json, track


def convert(
    layout: Annotated[
        Literal["acdc", "mnms", "mnms2", "ukbb", "bcv", "lits", "merge"],
        typer.Argument(help="The layout of SOURCE; merge: datasets in its folders.", show_default=False),
    ],
    source: Annotated[Path, typer.Argument(help="The dataset as downloaded and unpacked.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    json: Json = False,
) -> None:
    """Copy a public dataset into an nnU-Net raw folder, with the patient, vendor, centre, ... of cases in cases.csv.

    ACDC, M&Ms, M&Ms-2 and UK Biobank get the same labels (RV, MYO, LV); merge makes one dataset of them.

    Examples:

    utnetv2-fast convert acdc downloads/ACDC/database data/cardiac/acdc

    utnetv2-fast convert mnms downloads/OpenDataset data/cardiac/mnms

    utnetv2-fast convert merge data/cardiac data/all-cardiac
    """
    from utnetv2_fast.data.convert import convert as convert_dataset

    dataset = convert_dataset(layout, source, destination, track)
    patients = len({case.patient for case in dataset.cases})
    if json:
        print_json({"folder": destination, "layout": layout, "cases": len(dataset.cases), "patients": patients})
    else:
        console.print(f"{destination}: {len(dataset.cases)} cases of {patients} patients.", highlight=False)
