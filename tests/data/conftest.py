"""Small synthetic NIfTI files and datasets, as fixtures that return functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


def oriented_affine(
    permutation: Sequence[int] = (0, 1, 2),
    flips: Sequence[int] = (1, 1, 1),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    angles: Sequence[float] = (0.0, 0.0, 0.0),
    origin: Sequence[float] = (0.0, 0.0, 0.0),
) -> np.ndarray:
    """Affine (4, 4) whose stored axis i runs along world axis permutation[i], then turned by small angles (radians)."""
    axes = np.zeros((3, 3))
    for stored, (world, flip, size) in enumerate(zip(permutation, flips, spacing, strict=True)):
        axes[world, stored] = flip * size
    for angle, (a, b) in zip(angles, ((0, 1), (1, 2), (0, 2)), strict=True):
        turn = np.eye(3)
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        axes = turn @ axes
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    return affine


@pytest.fixture(scope="session")
def make_affine() -> Callable[..., np.ndarray]:
    return oriented_affine


def save_nifti(file: Path, array: np.ndarray, affine: np.ndarray | None = None, kind: type = nib.Nifti1Image) -> Path:
    """Write (X, Y, Z[, T]) with affine (default: 1 mm, RAS+)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(kind(array, np.eye(4) if affine is None else affine), file)
    return file


@pytest.fixture(scope="session")
def write_nifti() -> Callable[..., Path]:
    return save_nifti


def blobs(shape: Sequence[int], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (X, Y, Z) float32, nowhere zero, and a label map with a box of every class, brighter by class."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for value in range(1, classes + 1):
        corner = [rng.integers(0, max(1, size - max(1, size // 3))) for size in shape]
        box = tuple(slice(start, start + max(1, size // 3)) for start, size in zip(corner, shape, strict=True))
        label[box] = value
    label.flat[: classes + 1] = range(classes + 1)  # no class lies wholly under another
    return (100 + 50 * label + 5 * rng.standard_normal(shape)).astype(np.float32), label


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Path]:
    """make(folder, cases=3, ...) -> folder: an nnU-Net raw dataset CASE00, CASE01, ... of different scans."""

    def make(
        folder: Path,
        cases: int = 3,
        shape: Sequence[int] = (14, 12, 10),
        affine: np.ndarray | None = None,
        channels: Sequence[str] = ("MRI",),
        classes: int = 2,
        patients: Mapping[str, str] | None = None,
    ) -> Path:
        names = [f"CASE{index:02d}" for index in range(cases)]
        for seed, name in enumerate(names):
            image, label = blobs(shape, classes, seed)
            for channel in range(len(channels)):
                save_nifti(folder / f"imagesTr/{name}_{channel:04d}.nii.gz", image * (channel + 1), affine)
            save_nifti(folder / f"labelsTr/{name}.nii.gz", label, affine)
        content = {
            "channel_names": {str(index): channel for index, channel in enumerate(channels)},
            "labels": {"background": 0} | {f"class{value}": value for value in range(1, classes + 1)},
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(content))
        if patients is not None:
            lines = ["case,patient", *(f"{case},{patient}" for case, patient in patients.items())]
            (folder / "cases.csv").write_text("\n".join(lines) + "\n")
        return folder

    return make


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """edit(folder, key=value, ...) changes dataset.json; a value of None removes the key."""

    def edit(folder: Path, **changes: object) -> None:
        file = folder / "dataset.json"
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit
