"""A prepared fold in arrays and a run configured for it, small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from utnetv2_fast.data.plan import IntensityStatistics, Plan
from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.models import PRESETS, UTNetV2Config
from utnetv2_fast.training import RunConfig, RunFolder, default_training, loop, train

STATISTICS = IntensityStatistics(mean=0, std=1, median=0, minimum=-1, maximum=1, percentile_00_5=-1, percentile_99_5=1)


def write_run(folder: Path, preset: str = "tiny-2d", **settings: object) -> RunFolder:
    """A configured run of a tiny network on patches of 32 x 32, or in 3D of 4 x 32 x 32."""
    dimensions = PRESETS[preset].dimensions
    plan = Plan(
        dataset="squares",
        dimensions=dimensions,
        labels={"background": 0, "square": 1},
        channels=("MRI",),
        axes=(0, 1, 2),
        spacing=(None if dimensions == 2 else 1.0, 1.0, 1.0),
        median_shape=(4, 32, 32),
        normalisation=("zscore",),
        intensities=(STATISTICS,),
    )
    small = {"channels": (4, 8, 8, 8, 8), "heads": (2, 2, 2), "fusion_channels": 8, "fusion_heads": 2}
    model = UTNetV2Config(**PRESETS[preset].fields | small, in_channels=1, num_classes=2)
    defaults = {"epochs": 3, "steps_per_epoch": 4, "batch_size": 2, "precision": "float32"}
    run = RunFolder(folder)
    run.write_config(
        RunConfig(
            preset=preset,
            data="data",
            prepared="prepared",
            fold=0,
            train_cases=("case0", "case1"),
            held_out_cases=("case2",),
            plan=plan,
            patch_size=(4, 32, 32)[-dimensions:],
            model=model,
            training=default_training(preset).model_copy(update=defaults | settings),
        )
    )
    return run


def write_cases(folder: Path) -> list[PreparedCase]:
    """Three volumes (1, 4, 40, 36) with a bright square in every slice."""
    made = []
    for index in range(3):
        rng = np.random.default_rng(index)
        label = np.zeros((4, 40, 36), np.uint8)
        label[:, 10 + index : 24, 8 : 20 + index] = 1
        image = (2.0 * label + 0.3 * rng.standard_normal(label.shape))[None].astype(np.float16)
        foreground = np.argwhere(label).astype(np.int32)
        files = [folder / f"case{index}.{part}.npy" for part in ("image", "label", "foreground")]
        for file, array in zip(files, (image, label, np.insert(foreground, 0, 1, axis=1)), strict=True):
            np.save(file, array)
        made.append(PreparedCase(f"case{index}", f"patient{index}", *files))
    return made


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """make(name, **settings): see `write_run`."""

    def make(name: str = "run", **settings: object) -> RunFolder:
        return write_run(tmp_path / name, **settings)

    return make


@pytest.fixture
def cases(tmp_path: Path) -> list[PreparedCase]:
    """See `write_cases`."""
    return write_cases(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of two epochs of three steps that was never stopped; with one batch each for norms and validation."""
    folder = tmp_path_factory.mktemp("finished")
    run, (*train_cases, held_out) = write_run(folder / "run", epochs=2, steps_per_epoch=3), write_cases(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_NORM_BATCHES", 1)
        patch.setattr(loop, "_LEAST_VALIDATION_BATCHES", 1)
        train(run, train_cases, [held_out], torch.device("cpu"))
    return run
