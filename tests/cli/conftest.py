"""The command line called in this process, and a small dataset to call it with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utnetv2_fast.cli import app
from utnetv2_fast.data.phantom import write_phantom
from utnetv2_fast.data.plan import IntensityStatistics, Plan
from utnetv2_fast.models import UTNetV2
from utnetv2_fast.training import RunConfig, RunFolder, default_training


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """call("verb", argument, ...) runs `utnetv2-fast verb argument ...` and returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["utnetv2-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        return int(exit_.value.code or 0)

    return run


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A folder with 4 cases of 2 patients."""
    write_phantom(tmp_path / "demo", patients=2)
    return tmp_path / "demo"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of a random network for the phantom's channel and classes."""
    torch.manual_seed(0)
    network = UTNetV2.from_preset("tiny-2d", in_channels=1, num_classes=4)
    known = IntensityStatistics(mean=0, std=1, median=0, minimum=0, maximum=1, percentile_00_5=0, percentile_99_5=1)
    plan = Plan(
        dataset="demo",
        dimensions=2,
        labels={"background": 0, "RV": 1, "MYO": 2, "LV": 3},
        channels=("MRI",),
        axes=(0, 1, 2),
        spacing=(None, 4.0, 4.0),
        median_shape=(8, 64, 64),
        normalisation=("zscore",),
        intensities=(known,),
    )
    folder = RunFolder(tmp_path / "run")
    folder.write_config(
        RunConfig(
            preset="tiny-2d",
            data="demo",
            prepared="prepared",
            fold=0,
            train_cases=("a",),
            held_out_cases=("b",),
            plan=plan,
            patch_size=(64, 64),
            model=network.config,
            training=default_training("tiny-2d"),
        )
    )
    folder.save_weights("last", network.state_dict())
    return folder.path
