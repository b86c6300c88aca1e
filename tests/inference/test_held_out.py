"""Held-out scans are predicted as any scan, unless a leak is asked for; then it does what it says, and no more."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utnetv2_fast.data.dataset import Case
from utnetv2_fast.data.fingerprint import IntensityStatistics
from utnetv2_fast.data.nifti import read_label, read_scan
from utnetv2_fast.data.plan import Plan
from utnetv2_fast.data.preprocess import preprocess_image, preprocess_label
from utnetv2_fast.evaluation.metrics import evaluate_files
from utnetv2_fast.inference.held_out import predict_held_out, scored_files
from utnetv2_fast.inference.predict import Predictor

STATISTICS = IntensityStatistics(mean=0, std=1, median=0, minimum=-1, maximum=1, percentile_00_5=-1, percentile_99_5=1)
LABELS = {"background": 0, "bright": 1}


class Bright(nn.Module):
    """Class 1 where the z-scored image exceeds 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([1 - x, x - 1], 1)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Two bright boxes (i, j, k), of which the reference knows one; slices along j, flipped and turned."""
    rng = np.random.default_rng(0)
    image = rng.normal(100, 1, (30, 8, 24)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[4:12, 2:5, 6:15] = 1
    image[label == 1] = 200
    image[22:26, 5:7, 18:22] = 200
    affine = np.array([[-1.0, 0, 0, 5], [0, 0, 1.5, 2], [0, 4.0, 0, -3], [0, 0, 0, 1]])
    for name, array in (("scan", image), ("label", label)):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    return Case("one", (tmp_path / "scan.nii.gz",), tmp_path / "label.nii.gz", "one")


def make_predictor(**changes: object) -> Predictor:
    values = {
        "dataset": "test",
        "dimensions": 3,
        "labels": LABELS,
        "channels": ("MRI",),
        "axes": (0, 1, 2),
        "spacing": (4.0, 2.0, 2.0),
        "median_shape": (8, 16, 16),
        "normalisation": ("zscore",),
        "intensities": (STATISTICS,),
    }
    return Predictor([Bright().eval()], Plan(**values | changes), (8, 16, 16), torch.device("cpu"))


def test_without_a_leak_files_are_those_of_any_prediction(case: Case, tmp_path: Path) -> None:
    predictor = make_predictor()
    predict_held_out(predictor, [case], tmp_path / "out")
    assert scored_files([case], tmp_path / "out", "native") == [("one", tmp_path / "out/one.nii.gz", case.label)]
    np.testing.assert_array_equal(read_label(tmp_path / "out/one.nii.gz")[0], predictor(read_scan(case.images)))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["one.nii.gz"]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_on_the_resampled_grid_both_label_maps_are_the_networks_own(
    case: Case, tmp_path: Path, axes: tuple[int, int, int]
) -> None:
    predictor = make_predictor(axes=axes)
    predict_held_out(predictor, [case], tmp_path / "out", "resampled")
    [(name, prediction_file, reference_file)] = scored_files([case], tmp_path / "out", "resampled")
    image, geometry = preprocess_image(read_scan(case.images), predictor.plan)
    back = np.argsort(axes)
    prediction, grid = read_label(prediction_file)
    expected = predictor.probabilities(image).argmax(0).numpy().transpose(back)
    np.testing.assert_array_equal(prediction, expected)
    reference, reference_grid = read_label(reference_file)
    label, _ = read_label(case.label)
    np.testing.assert_array_equal(reference, preprocess_label(label, geometry, predictor.plan).transpose(back))
    assert grid.spacing == reference_grid.spacing == tuple((4.0, 2.0, 2.0)[axis] for axis in back)
    evaluation = evaluate_files([(name, prediction_file, reference_file)], LABELS)
    assert 0.5 < evaluation.mean("dice") < 1


def test_a_crop_by_the_label_hides_what_lies_outside(case: Case, tmp_path: Path) -> None:
    """The second bright box, a false positive, is gone; predicted without its label map, the scan is whole."""
    whole, cropping = make_predictor(), make_predictor(crop="label", label_context=(1, 2, 2))
    for name, predictor in (("whole", whole), ("cropped", cropping)):
        predict_held_out(predictor, [case], tmp_path / name)
    label, grid = read_label(case.label)
    (seen, _), (hidden, hidden_grid) = (read_label(tmp_path / f"{name}/one.nii.gz") for name in ("whole", "cropped"))
    np.testing.assert_array_equal(hidden_grid.affine, grid.affine)
    outside = np.ones(label.shape, bool)
    box = tuple(slice(max(0, found.min() - 3), found.max() + 4) for found in np.nonzero(label))
    outside[box] = False
    assert seen[outside].any()
    assert not hidden[outside].any()
    assert hidden[label == 1].mean() > 0.8
    np.testing.assert_array_equal(cropping(read_scan(case.images)), make_predictor(crop="none")(read_scan(case.images)))


def test_both_leaks_at_once(case: Case, tmp_path: Path) -> None:
    predictor = make_predictor(crop="label", label_context=(1, 2, 2))
    predict_held_out(predictor, [case], tmp_path / "out", "resampled")
    prediction, _ = read_label(tmp_path / "out/one.nii.gz")
    reference, _ = read_label(tmp_path / "out/references/one.nii.gz")
    assert prediction.shape == reference.shape == (5, 11, 8)
