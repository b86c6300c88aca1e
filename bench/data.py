"""Measures how scans come to the network: resampled, augmented, and read ahead while a training goes on.

Peers run in the same process on the same data: MONAI's transforms, and resampling the way nnU-Net does it, by
scikit-image. Results are checked before they are timed. Needs the extra `[bench]` and one dataset, of which the first
scans are used.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bench.measure import machine, shortest, table
from utnetv2_fast.data.augment import PROFILES, augment, source_size
from utnetv2_fast.data.dataset import Dataset, read_dataset
from utnetv2_fast.data.nifti import Scan, read_label, read_scan
from utnetv2_fast.data.prepare import prepare
from utnetv2_fast.data.resample import nearest_indices, resample_image, resample_label, separate_axis
from utnetv2_fast.experiment import new_runs
from utnetv2_fast.memory import keep_freed_memory
from utnetv2_fast.models import get_preset
from utnetv2_fast.training import loop
from utnetv2_fast.training.recipe import change_training, recipe_for_preset

CPU = torch.device("cpu")
SAMPLES = 12  # augmented for a figure: effects strike at random
ROUNDS = 3
T = TypeVar("T")


# ---- resampling


def as_nnunet(image: NDArray[np.float32], shape: Sequence[int], axis: int | None, order: int) -> NDArray[np.float32]:
    """(D, H, W) -> shape by scikit-image; slice by slice with nearest neighbours along a separate axis."""
    from skimage.transform import resize

    def resized(part: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
        return resize(part, size, order=order, mode="edge", anti_aliasing=False)

    if axis is None:
        return resized(image, shape)
    slices = np.moveaxis(image, axis, 0)
    plane = [size for a, size in enumerate(shape) if a != axis]
    planes = np.stack([resized(part, plane) for part in slices])
    return np.moveaxis(planes[nearest_indices(len(slices), shape[axis])], 0, axis)


def label_as_nnunet(label: NDArray[np.uint8], shape: Sequence[int], axis: int | None) -> NDArray[np.uint8]:
    """Every class's indicator resized, the class taken where it reaches one half."""
    result = np.zeros(shape, dtype=np.uint8)
    for value in np.unique(label):
        result[as_nnunet((label == value).astype(np.float32), shape, axis, 1) >= 0.5] = value
    return result


def resampling_rows(scan: Scan, label: NDArray[np.uint8], new_spacing: Sequence[float]) -> list[list[str]]:
    """A channel of a scan and its label map to another spacing: milliseconds of everyone."""
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    spacing = scan.grid.spacing
    image = scan.image[:1]
    shape = [max(1, round(n * old / new)) for n, old, new in zip(image.shape[1:], spacing, new_spacing, strict=True)]
    axis = separate_axis(spacing, new_spacing)
    if axis is None:  # an axis that keeps its size is left alone
        axis = next((a for a, (old, new) in enumerate(zip(image.shape[1:], shape, strict=True)) if old == new), None)
    ours, theirs = resample_image(image, shape, spacing, new_spacing)[0], as_nnunet(image[0], shape, axis, 3)
    worst = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    assert worst < 1e-3, f"resampled images differ by {worst}"
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    meta = MetaTensor(torch.from_numpy(image), affine=affine)
    cubic, linear = (Spacing(new_spacing, mode=mode, padding_mode="nearest") for mode in (3, 1))
    times = shortest(
        {
            "ours": lambda: resample_image(image, shape, spacing, new_spacing),
            "scikit-image": lambda: as_nnunet(image[0], shape, axis, 3),
            "MONAI": lambda: cubic(meta),
            "our label": lambda: resample_label(label, shape, spacing, new_spacing),
            "scikit-image's label": lambda: label_as_nnunet(label, shape, axis),
            "MONAI, linear": lambda: linear(meta),
        },
        ROUNDS,
        CPU,
    )
    ms = {name: 1e3 * value for name, value in times.items()}
    size = f"{'x'.join(map(str, image.shape[1:]))} -> {'x'.join(map(str, shape))}"
    return [
        [f"image, cubic, {size}", *_beside(ms["ours"], ms["scikit-image"], ms["MONAI"])],
        [f"label, linear, {size}", *_beside(ms["our label"], ms["scikit-image's label"], ms["MONAI, linear"])],
    ]


def _beside(ours: float, *peers: float) -> list[str]:
    return [f"{ours:.1f}", *(f"{peer:.1f} ({peer / ours:.1f} x)" for peer in peers)]


# ---- augmentation


def augmentation_row(patch: tuple[int, ...], spacing: tuple[float, ...], profile_name: str) -> list[str]:
    """Milliseconds of a thread for a sample, ours and MONAI's with the same effects as often."""
    profile = PROFILES[profile_name]
    source = source_size(patch, profile, spacing)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, 1, *source), generator=generator)
    label = torch.randint(4, (1, *source), generator=generator, dtype=torch.uint8)
    monai = _monai_transform(patch)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {"ours": [], "MONAI": []}
    for step in range(SAMPLES + 2):
        for name, run in (
            ("ours", lambda step=step: augment(image, label, patch, spacing, profile, (0, step))),
            ("MONAI", lambda: monai({"image": image[0], "label": label})),
        ):
            started = time.perf_counter()
            run()
            taken[name].append(1e3 * (time.perf_counter() - started))
    torch.set_num_threads(before)
    ours, theirs = (statistics.mean(times[2:]) for times in taken.values())
    return [f"{profile_name}, {'x'.join(map(str, patch))} of {'x'.join(map(str, source))}", *_beside(ours, theirs)]


def _monai_transform(patch: tuple[int, ...]) -> Callable[[Any], Any]:
    """nnU-Net's effects as far as MONAI has them, with nnU-Net's probabilities and ranges."""
    from monai import transforms as m

    turn = math.radians(30) if len(patch) == 3 else math.pi
    return m.Compose(
        [
            m.RandAffined(
                ["image", "label"],
                prob=0.36,  # of a rotation or a scaling, each 0.2
                rotate_range=[turn] * (3 if len(patch) == 3 else 1),
                scale_range=[(-0.3, 0.4)] * len(patch),
                spatial_size=patch,
                mode=["bilinear", "nearest"],
                padding_mode="zeros",
            ),
            m.CenterSpatialCropd(["image", "label"], roi_size=patch),
            m.RandGaussianNoised(["image"], prob=0.1, std=0.3),
            m.RandGaussianSmoothd(["image"], prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
            m.RandScaleIntensityd(["image"], factors=0.25, prob=0.15),
            m.RandScaleIntensityFixedMeand(["image"], factors=0.25, prob=0.15),
            m.RandSimulateLowResolutiond(
                ["image"],
                prob=0.25,
                zoom_range=(0.5, 1.0),
                upsample_mode="trilinear" if len(patch) == 3 else "bilinear",
            ),
            m.RandAdjustContrastd(["image"], prob=0.1, gamma=(0.7, 1.5), invert_image=True),
            m.RandAdjustContrastd(["image"], prob=0.3, gamma=(0.7, 1.5)),
            *(m.RandFlipd(["image", "label"], prob=0.5, spatial_axis=axis) for axis in range(len(patch))),
        ]
    )


# ---- preparation and the wait of a training


def preparation_seconds(dataset: Dataset, dimensions: int, folder: Path) -> float:
    """Of a scan: all that `prepare` does, in its threads."""
    started = time.perf_counter()
    prepare(dataset, folder, dimensions)
    return (time.perf_counter() - started) / len(dataset.cases)


def training_row(dataset: Dataset, folder: Path, preset: str, batch_size: int, steps: int) -> list[str]:
    """How long the steps of a training take, and how long of that it waits for its batches."""
    waits: list[float] = []
    ends: list[float] = []
    prefetch = loop.prefetch

    def timed(make: Callable[[int], T], numbers: Iterable[int], ahead: int = 2) -> Generator[T, None, None]:
        batches = prefetch(make, numbers, ahead)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            waits.append(time.perf_counter() - started)
            yield batch

    store = prepare(dataset, folder, get_preset(preset).dimensions)
    changes = {"epochs": 1, "steps_per_epoch": steps, "batch_size": batch_size}
    recipe = change_training(recipe_for_preset(preset, "clean"), changes)
    [(run, config)] = new_runs(store, dataset.folder, recipe, [0], folder / f"run-{preset}")
    run.write_config(config)
    names = {case.name: case for case in store.cases}
    loop.prefetch = timed  # type: ignore[assignment]
    try:
        loop.train(
            run,
            [names[name] for name in config.train_cases],
            [names[name] for name in config.held_out_cases],
            CPU,
            watch=lambda progress: ends.append(time.perf_counter()),
        )
    finally:
        loop.prefetch = prefetch
    # The first batches are made while nothing else can be done.
    first = 3
    step = (ends[-1] - ends[first - 1]) / (len(ends) - first)
    wait = statistics.mean(waits[first : len(ends)])
    name = f"{preset}, batch {batch_size} of {'x'.join(map(str, config.patch_size))}"
    return [name, f"{1e3 * step:.0f}", f"{1e3 * wait:.1f}", f"{100 * wait / step:.1f} %"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.data",
        description=__doc__,
        epilog="Example: python -m bench.data --data data/acdc data/hippocampus --out bench/results/data.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR", help="datasets")
    parser.add_argument("--steps", type=int, default=20, help="of each training (default: 20)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the tables here")
    options = parser.parse_args()
    keep_freed_memory()
    resampled: list[list[str]] = []
    prepared: list[list[str]] = []
    trained: list[list[str]] = []
    for folder in options.data:
        dataset = read_dataset(folder)
        case = dataset.cases[0]
        assert case.label is not None
        scan, (label, _) = read_scan(case.images, len(dataset.channels)), read_label(case.label)
        with tempfile.TemporaryDirectory() as temporary:
            flat = max(scan.grid.spacing) > 3 * min(scan.grid.spacing)
            preset, batch_size = ("acdc-2d", 4) if flat else ("tiny-3d", 2)
            dimensions = get_preset(preset).dimensions
            taken = preparation_seconds(dataset, dimensions, Path(temporary) / "prepared")
            prepared.append([f"{folder.name}, {len(dataset.cases)} scans, {dimensions}D", f"{1e3 * taken:.0f}"])
            z, y, x = scan.grid.spacing
            for row in resampling_rows(scan, label, (z, 0.7 * y, 0.7 * x) if flat else (0.7 * z, 0.7 * y, 0.7 * x)):
                resampled.append([f"{folder.name}: {row[0]}", *row[1:]])
            trained.append(training_row(dataset, Path(temporary) / "prepared", preset, batch_size, options.steps))
    augmented = [
        augmentation_row((32, 128, 128), (3.0, 1.0, 1.0), "nnunet"),
        augmentation_row((32, 128, 128), (3.0, 1.0, 1.0), "paper"),
        augmentation_row((64, 64, 64), (1.0, 1.0, 1.0), "nnunet"),
        augmentation_row((256, 256), (1.5, 1.5), "nnunet"),
    ]
    notes = machine() | {"command": shlex.join(["python", "-m", "bench.data", *sys.argv[1:]])}
    text = "\n\n".join(
        [
            "\n".join(f"* {key}: {value}" for key, value in notes.items()),
            "Resampling, milliseconds of a volume:",
            table(["volume", "ours", "scikit-image, as nnU-Net", "MONAI Spacing"], resampled),
            "Preparation by `prepare` (reading, statistics, cropping, normalising, resampling, writing):",
            table(["dataset", "ms a scan"], prepared),
            "Augmentation, milliseconds of one thread for a sample (mean; effects strike at random):",
            table(["profile and patch", "ours", "MONAI"], augmented),
            "Training on this CPU, which reads and augments in a thread beside its steps:",
            table(["network", "ms a step", "ms waited for the batch", "share"], trained),
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text("# How data reach the network, as measured\n\n" + text + "\n")


if __name__ == "__main__":
    main()
