"""The fingerprint measures foreground intensities and cropped grids, the same on every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from utnetv2_fast.data.dataset import read_dataset
from utnetv2_fast.data.fingerprint import compute_fingerprint, nonzero_box
from utnetv2_fast.data.nifti import read_label, read_scan
from utnetv2_fast.errors import InputError


def test_box_of_what_is_not_zero() -> None:
    image = np.zeros((2, 6, 7, 8), np.float32)
    assert nonzero_box(image) == (slice(0, 6), slice(0, 7), slice(0, 8))
    image[0, 2, 3, 4] = -1
    image[1, 5, 3, 0] = 1
    assert nonzero_box(image) == (slice(2, 6), slice(3, 4), slice(0, 5))


def test_statistics_are_those_of_the_foreground(tmp_path: Path, make_dataset: Callable, make_affine: Callable) -> None:
    affine = make_affine((2, 0, 1), (1, -1, 1), (3.0, 1.0, 2.0))
    dataset = read_dataset(make_dataset(tmp_path, cases=3, affine=affine, channels=("a", "b")))
    fingerprint = compute_fingerprint(dataset)
    # Stored axes run along world z, x, y; the canonical order is z, y, x.
    assert [case.spacing for case in fingerprint.cases.values()] == [(3.0, 2.0, 1.0)] * 3
    assert [case.shape for case in fingerprint.cases.values()] == [(14, 10, 12)] * 3
    for channel, statistics in enumerate(fingerprint.intensities):
        pooled, weights = [], []
        for case in dataset.cases:
            values = read_scan(case.images).image[channel][read_label(case.label)[0] > 0].astype(np.float64)
            pooled.append(values)
            weights.append(np.full(values.size, 1 / values.size / 3))
        values, weight = np.concatenate(pooled), np.concatenate(weights)
        mean = (values * weight).sum()
        std = np.sqrt(((values - mean) ** 2 * weight).sum())
        assert statistics.mean == pytest.approx(mean, rel=1e-3)
        assert statistics.std == pytest.approx(std, rel=2e-3)
        assert (statistics.minimum, statistics.maximum) == (values.min(), values.max())
        order = np.argsort(values)
        shares = weight[order].cumsum()
        for share, found in ((0.005, "percentile_00_5"), (0.5, "median"), (0.995, "percentile_99_5")):
            expected = values[order][np.searchsorted(shares, share)]
            assert getattr(statistics, found) == pytest.approx(expected, rel=2e-2), found


def test_crop_is_measured(tmp_path: Path, make_dataset: Callable, write_nifti: Callable) -> None:
    folder = make_dataset(tmp_path, cases=2)
    image, label = np.zeros((14, 12, 10), np.float32), np.zeros((14, 12, 10), np.uint8)
    image[2:9, :6, 5:] = np.arange(7)[:, None, None] + 1
    label[3, 3, 6], label[4, 3, 6] = 1, 2
    write_nifti(folder / "imagesTr/CASE00_0000.nii.gz", image)
    write_nifti(folder / "labelsTr/CASE00.nii.gz", label)
    case = compute_fingerprint(read_dataset(folder)).cases["CASE00"]
    assert case.shape == (5, 6, 7)
    assert case.relative_size == pytest.approx(5 * 6 * 7 / (14 * 12 * 10))


def test_a_case_without_foreground_counts_for_its_grid_only(
    tmp_path: Path, make_dataset: Callable, write_nifti: Callable
) -> None:
    folder = make_dataset(tmp_path, cases=3)
    write_nifti(folder / "labelsTr/CASE01.nii.gz", np.zeros((14, 12, 10), np.uint8))
    fingerprint = compute_fingerprint(read_dataset(folder))
    assert set(fingerprint.cases) == {"CASE00", "CASE01", "CASE02"}
    assert fingerprint.intensities[0].minimum > 100


def test_same_every_time(tmp_path: Path, make_dataset: Callable) -> None:
    dataset = read_dataset(make_dataset(tmp_path, cases=5))
    assert compute_fingerprint(dataset) == compute_fingerprint(dataset)


def test_problems_stop_it(tmp_path: Path, make_dataset: Callable) -> None:
    folder = make_dataset(tmp_path, cases=3)
    for name in ("CASE00", "CASE02"):
        (folder / f"labelsTr/{name}.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"CASE00.*\(1 more"):
        compute_fingerprint(read_dataset(folder))
