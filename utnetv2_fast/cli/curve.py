"""`utnetv2-fast curve`: scores against the amount of data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from utnetv2_fast.cli import study
from utnetv2_fast.cli.console import Json
from utnetv2_fast.errors import InputError


def curve(
    context: typer.Context,
    models: study.Models = "utnetv2,resunet",
    percent: Annotated[str, typer.Option(help="Shares of the patients to train on.")] = "5,10,40,70,100",
    pretrained: study.Pretrained = None,
    data: study.Data = None,
    preset: study.PresetName = None,
    recipe: study.RecipeName = None,
    protocol: study.ProtocolName = None,
    folds: study.Folds = "0",
    seeds: study.Seeds = 1,
    minutes: study.Minutes = None,
    held_out: study.HeldOut = None,
    out: study.Out = Path("studies/curve"),
    prepared: study.PreparedFolder = None,
    device: study.Device = "auto",
    epochs: study.Epochs = None,
    steps_per_epoch: study.StepsPerEpoch = None,
    batch_size: study.BatchSize = None,
    json: Json = False,
) -> None:
    """Train networks on growing shares of the patients, each part of the next, and score them on the same scans.

    The tables have the form of the paper's Tables 1 and 3, the figure that of its Fig. 2A. The number of steps is the
    same for every share.

    Examples:

    utnetv2-fast curve --held-out subset=testing

    utnetv2-fast curve --data data/acdc --preset acdc-2d --models utnetv2,resunet,swinunet --percent 10,100
    """
    study.carry_out(context, study.names(models), _shares(percent))


def _shares(percent: str) -> list[float]:
    try:
        shares = [float(part) / 100 for part in study.names(percent)]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise InputError(f"--percent {percent}: give shares above 0 and up to 100, such as 5,10,100.")
    return sorted(shares)
