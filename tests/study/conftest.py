"""Finished trials, made up: a configuration and scores, with nothing trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from utnetv2_fast.data.plan import IntensityStatistics, Plan
from utnetv2_fast.evaluation.metrics import Evaluation, Score
from utnetv2_fast.models import PRESETS, UTNetV2Config
from utnetv2_fast.study.results import Result
from utnetv2_fast.training import RunConfig, RunFolder, default_training

STATISTICS = IntensityStatistics(mean=0, std=1, median=0, minimum=-1, maximum=1, percentile_00_5=-1, percentile_99_5=1)
PLAN = Plan(
    dataset="made up",
    dimensions=2,
    labels={"background": 0, "RV": 1, "LV": 2},
    channels=("MRI",),
    axes=(0, 1, 2),
    spacing=(None, 1.0, 1.0),
    median_shape=(4, 32, 32),
    normalisation=("zscore",),
    intensities=(STATISTICS,),
)


def score(case: str, label: str, dice: float) -> Score:
    if math.isnan(dice):
        return Score(case, label, dice, dice, dice, 0, 0)
    return Score(case, label, dice, 10 * (1 - dice), dice, 100, 100)


def make_result(
    network: str,
    dice: Mapping[str, tuple[float, float]],
    *,
    seed: int = 0,
    fold: int = 0,
    share: float = 1.0,
    data: str = "data",
    train_cases: tuple[str, ...] = ("t0", "t1"),
) -> Result:
    """`dice` is {case: its Dice of RV and LV}; HD95 follows from it."""
    config = RunConfig(
        preset="tiny-2d",
        network=network,
        data=data,
        prepared="prepared",
        fold=fold,
        share_of_patients=share,
        train_cases=train_cases,
        held_out_cases=tuple(dice),
        plan=PLAN,
        patch_size=(32, 32),
        model=UTNetV2Config(**PRESETS["tiny-2d"].fields, in_channels=1, num_classes=3),
        training=default_training("tiny-2d").model_copy(update={"seed": seed}),
    )
    scores = [
        score(case, label, value)
        for case, pair in dice.items()
        for label, value in zip(("RV", "LV"), pair, strict=True)
    ]
    return Result(RunFolder(Path("nowhere")), config, Evaluation(("RV", "LV"), 1.0, tuple(scores)), 120.0, 480)


@pytest.fixture
def result() -> Callable[..., Result]:
    """See `make_result`."""
    return make_result
