"""The held-out scans of a run, predicted to be scored: as any scan is, or as a leak of the authors' code has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from utnetv2_fast.data.dataset import Case
from utnetv2_fast.data.nifti import Grid, read_label, read_scan, write_label
from utnetv2_fast.data.plan import Plan
from utnetv2_fast.data.preprocess import Geometry, preprocess_image, preprocess_label, restore_label, target_spacing
from utnetv2_fast.inference.predict import Predictor, predict_files
from utnetv2_fast.progress import Track, silent

ScoredGrid = Literal["native", "resampled"]


def scored_files(cases: Sequence[Case], folder: Path, grid: ScoredGrid) -> list[tuple[str, Path, Path]]:
    """(case, prediction file, reference file) of the labelled cases, as `predict_held_out` leaves them in `folder`."""
    pairs = []
    for case in cases:
        if case.label is not None:
            reference = case.label if grid == "native" else folder / "references" / f"{case.name}.nii.gz"
            pairs.append((case.name, folder / f"{case.name}.nii.gz", reference))
    return pairs


def predict_held_out(
    predictor: Predictor, cases: Sequence[Case], folder: Path, grid: ScoredGrid = "native", track: Track = silent
) -> None:
    """Write the label map of every case to `folder/CASE.nii.gz`.

    On the grid "resampled" that is the network's own, and the reference goes to `folder/references` resampled onto it.
    A plan that crops by the label crops these scans by theirs: outside lies background. Both flatter the scores.
    """
    if grid == "native" and predictor.plan.crop != "label":
        predict_files(predictor, cases, folder, track, overwrite=True)
        return
    for case in track([case for case in cases if case.label is not None], "Predicting"):
        _predict_knowing_label(predictor, case, folder / f"{case.name}.nii.gz", grid)


def _predict_knowing_label(predictor: Predictor, case: Case, file: Path, grid: ScoredGrid) -> None:
    assert case.label is not None
    plan = predictor.plan
    scan, (reference, _) = read_scan(case.images, len(plan.channels)), read_label(case.label)
    image, geometry = preprocess_image(scan, plan, reference)
    probabilities = predictor.probabilities(image)
    if grid == "native":
        write_label(file, restore_label(probabilities, geometry, plan), scan.grid)
        return
    predicted = np.stack([plane.argmax(0).cpu().numpy() for plane in probabilities]).astype(np.uint8)
    for target, label in (
        (file, predicted),
        (file.parent / "references" / file.name, preprocess_label(reference, geometry, plan)),
    ):
        write_label(target, *_on_own_grid(label, geometry, plan))


def _on_own_grid(label: NDArray[np.uint8], geometry: Geometry, plan: Plan) -> tuple[NDArray[np.uint8], Grid]:
    """A label map (D, H, W) as (Z, Y, X), and a grid that has its spacing, along the axes of the world."""
    back = np.argsort(geometry.axes)
    canonical = np.ascontiguousarray(label.transpose(back))
    z, y, x = (target_spacing(geometry, plan)[axis] for axis in back)
    depth, height, width = canonical.shape
    return canonical, Grid((width, height, depth), np.diag([x, y, z, 1.0]))
