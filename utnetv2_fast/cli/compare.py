"""`utnetv2-fast compare`: several networks trained and scored alike."""

from __future__ import annotations

from pathlib import Path

import typer

from utnetv2_fast.cli import study
from utnetv2_fast.cli.console import Json


def compare(
    context: typer.Context,
    models: study.Models = "utnetv2,resunet",
    pretrained: study.Pretrained = None,
    data: study.Data = None,
    preset: study.PresetName = None,
    recipe: study.RecipeName = None,
    protocol: study.ProtocolName = None,
    folds: study.Folds = "0",
    seeds: study.Seeds = 1,
    minutes: study.Minutes = None,
    held_out: study.HeldOut = None,
    out: study.Out = Path("studies/compare"),
    prepared: study.PreparedFolder = None,
    device: study.Device = "auto",
    epochs: study.Epochs = None,
    steps_per_epoch: study.StepsPerEpoch = None,
    batch_size: study.BatchSize = None,
    json: Json = False,
) -> None:
    """Train several networks on the same folds with the same settings, and put their scores side by side.

    The tables have the form of the paper's Tables 2 and 4 to 7: mean and deviation over folds and seeds, Dice and HD95
    of each class, and a paired test against UTNetV2. Beside a tiny preset every network is given as many parameters as
    UTNetV2, beside the paper's presets its published size. Started by torchrun, each process takes the next training
    that is free.

    Examples:

    utnetv2-fast compare

    utnetv2-fast compare --data data/hippocampus --preset tiny-3d --models utnetv2,resunet,unetr,nnunet --minutes 5

    utnetv2-fast compare --data data/acdc --recipe acdc-2d --models utnetv2,unet,transunet --folds all --seeds 3

    torchrun --nproc-per-node 2 -m utnetv2_fast compare --data data/acdc --folds all
    """
    study.carry_out(context, study.names(models))
