"""`utnetv2-fast ablate`: what each part of UTNetV2 contributes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from utnetv2_fast.cli import study
from utnetv2_fast.cli.console import Json
from utnetv2_fast.errors import InputError


def ablate(
    context: typer.Context,
    group: Annotated[
        str,
        typer.Argument(
            help="ladder: from residual blocks to UTNetV2, a part each. position: B-MHA at one level only. map-size: "
            "of the semantic map, and of keys made by convolution. attention: left out. Or several, with commas.",
            show_default=False,
        ),
    ],
    data: study.Data = None,
    preset: study.PresetName = None,
    recipe: study.RecipeName = None,
    protocol: study.ProtocolName = None,
    folds: study.Folds = "0",
    seeds: study.Seeds = 1,
    minutes: study.Minutes = None,
    held_out: study.HeldOut = None,
    out: study.Out = Path("studies/ablate"),
    prepared: study.PreparedFolder = None,
    device: study.Device = "auto",
    epochs: study.Epochs = None,
    steps_per_epoch: study.StepsPerEpoch = None,
    batch_size: study.BatchSize = None,
    json: Json = False,
) -> None:
    """Train UTNetV2 without this or that part of it, and compare (paper Fig. 8A, 8B and 4C).

    All variants have the channels of the preset, so they differ in parameters; the table says by how much.

    Examples:

    utnetv2-fast ablate ladder

    utnetv2-fast ablate position,map-size --data data/acdc --recipe acdc-2d --folds all
    """
    from utnetv2_fast.models.ablations import ABLATIONS

    groups = study.names(group)
    if unknown := next((name for name in groups if name not in ABLATIONS), None):
        raise InputError(f"There is no group {unknown!r}; choose of {', '.join(ABLATIONS)}.")
    study.carry_out(context, list(dict.fromkeys(network for name in groups for network in ABLATIONS[name])))
