"""`utnetv2-fast prepare`: a dataset made ready to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from utnetv2_fast.cli.console import Json, console, print_json, track
from utnetv2_fast.ranks import ranks_of_this_job


def prepare(
    dataset: Annotated[Path, typer.Argument(help="The folder that holds dataset.json.", show_default=False)],
    dimensions: Annotated[Literal[2, 3], typer.Option("--dimensions", "-d", help="For 2D or 3D networks.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write.", show_default="prepared/NAME-2d or -3d"),
    ] = None,
    json: Json = False,
) -> None:
    """Verify a dataset, plan it by nnU-Net's rules, resample every case and store it for training.

    What is prepared already and has not changed is not done again. Started by torchrun or srun, the processes share the
    cases.

    Example: utnetv2-fast prepare data/acdc --dimensions 2
    """
    from utnetv2_fast.data.dataset import read_dataset
    from utnetv2_fast.data.prepare import default_folder
    from utnetv2_fast.data.prepare import prepare as prepare_dataset

    ranks = ranks_of_this_job()
    content = read_dataset(dataset)
    folder = out or default_folder(content, dimensions)
    prepared = prepare_dataset(content, folder, dimensions, track, ranks=ranks)
    if not ranks.first:
        return
    plan = prepared.plan
    if json:
        print_json({"folder": prepared.folder, "cases": len(prepared.cases), "plan": plan.model_dump(mode="json")})
        return
    spacing = " x ".join("own" if size is None else f"{size:.3g}" for size in plan.spacing)
    shape = " x ".join(map(str, plan.median_shape))
    console.print(
        f"{prepared.folder}: {len(prepared.cases)} cases, spacing {spacing} mm, median shape {shape} (D x H x W), "
        f"{', '.join(f'{c}: {n}' for c, n in zip(plan.channels, plan.normalisation, strict=True))}.",
        highlight=False,
        soft_wrap=True,
    )
