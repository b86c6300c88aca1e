"""`utnetv2-fast prepare`: a dataset made ready to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from utnetv2_fast.cli.console import Json, console, print_json, track
from utnetv2_fast.errors import InputError
from utnetv2_fast.ranks import ranks_of_this_job


def prepare(
    dataset: Annotated[Path, typer.Argument(help="The folder that holds dataset.json.", show_default=False)],
    dimensions: Annotated[
        Literal[2, 3] | None,
        typer.Option("--dimensions", "-d", help="For 2D or 3D networks.", show_default="the recipe's, or 3"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Prepare as `train --recipe` does: the name of a recipe, or FILE.yaml.", show_default=False),
    ] = None,
    protocol: Annotated[
        Literal["clean", "paper"] | None, typer.Option(help="Of the recipe.", show_default="the recipe's own")
    ] = None,
    leak_label_crop: Annotated[
        bool, typer.Option("--leak-label-crop", help="Crop all scans, held-out ones too, to their labels.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write.", show_default="where `train` looks: prepared/NAME-2d or -3d"),
    ] = None,
    json: Json = False,
) -> None:
    """Verify a dataset, plan it by nnU-Net's rules or a recipe's, resample every case and store it for training.

    What is prepared already and has not changed is not done again. Started by torchrun or srun, the processes share the
    cases.

    Examples:

    utnetv2-fast prepare data/acdc --dimensions 2

    utnetv2-fast prepare data/bcv --recipe bcv-3d --protocol paper
    """
    from utnetv2_fast.data.dataset import read_dataset
    from utnetv2_fast.data.plan import Preparation
    from utnetv2_fast.data.prepare import default_folder
    from utnetv2_fast.data.prepare import prepare as prepare_dataset
    from utnetv2_fast.models import get_preset
    from utnetv2_fast.training.recipe import load_recipe, with_leaks

    ranks = ranks_of_this_job()
    preparation = Preparation()
    if recipe is not None:
        settings = with_leaks(load_recipe(recipe, protocol), ["label-crop"] if leak_label_crop else [])
        wanted, preparation = get_preset(settings.preset).dimensions, settings.preparation
        if dimensions not in (None, wanted):
            raise InputError(f"The recipe {recipe} is for {wanted}D networks; leave --dimensions {dimensions} out.")
        dimensions = wanted
    elif protocol is not None or leak_label_crop:
        raise InputError("--protocol and --leak-label-crop change a recipe; name it with --recipe.")
    dimensions = dimensions or 3
    content = read_dataset(dataset)
    folder = out or default_folder(content, dimensions, preparation)
    prepared = prepare_dataset(content, folder, dimensions, track, preparation, ranks=ranks)
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
