"""The demo dataset: the same bytes each time, patients with two phases, anatomy and labels that belong together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from utnetv2_fast.data.dataset import Dataset
from utnetv2_fast.data.nifti import read_label, read_scan
from utnetv2_fast.data.phantom import LABELS, write_phantom
from utnetv2_fast.data.verify import find_problems

PATIENTS = 8


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_phantom(tmp_path_factory.mktemp("phantom"), PATIENTS)


@pytest.fixture(scope="module")
def scans(phantom: Dataset) -> list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]:
    """Image, label (Z, Y, X) and spacing of every case, brought to canonical orientation."""
    found = []
    for case in phantom.cases:
        assert case.label is not None
        scan = read_scan(case.images)
        found.append((scan.image[0], read_label(case.label)[0], scan.grid.spacing))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_depend_on_the_seed_alone(phantom: Dataset, tmp_path: Path) -> None:
    again = contents(write_phantom(tmp_path / "again", 2).folder)
    first = contents(phantom.folder)
    scans = [name for name in again if name.endswith(".nii.gz")]
    assert len(scans) == 8
    assert all(again[name] == first[name] for name in scans)  # whether 2 patients are made or 8
    other = contents(write_phantom(tmp_path / "other", 1, seed=1).folder)
    assert all(other[name] != first[name] for name in other if name.endswith(".nii.gz"))


def test_it_is_a_dataset_without_problems(phantom: Dataset) -> None:
    assert find_problems(phantom) == []
    assert phantom.labels == LABELS
    assert phantom.channels == ("MR",)


def test_each_patient_has_both_phases_and_one_vendor(phantom: Dataset) -> None:
    assert Counter(case.patient for case in phantom.cases) == {f"patient{i + 1:03d}": 2 for i in range(PATIENTS)}
    for patient in {case.patient for case in phantom.cases}:
        pair = [case.metadata for case in phantom.cases if case.patient == patient]
        assert {row["phase"] for row in pair} == {"ED", "ES"}
        assert len({row["vendor"] for row in pair}) == 1
    assert Counter(case.metadata["vendor"] for case in phantom.cases) == dict.fromkeys("ABCD", PATIENTS // 2)


def test_grids_are_those_of_short_axis_scans(
    phantom: Dataset, scans: list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]
) -> None:
    for image, label, (z, y, x) in scans:
        assert image.shape == label.shape
        assert 6 <= image.shape[0] <= 12
        assert all(112 <= side <= 144 for side in image.shape[1:])
        assert 8 <= z <= 10
        assert 1.2 <= y <= 1.9
        assert x == pytest.approx(y)
    affines = [nib.load(case.images[0]).affine[:3, :3] for case in phantom.cases]
    oblique = [not np.allclose(np.sort(np.abs(a), axis=0)[:2], 0, atol=1e-6) for a in affines]
    flipped = [nib.aff2axcodes(nib.load(case.images[0]).affine) != ("R", "A", "S") for case in phantom.cases]
    assert 0 < sum(oblique) < len(oblique)
    assert 0 < sum(flipped) < len(flipped)


def test_hearts_are_built_as_hearts_are(
    scans: list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]],
) -> None:
    for _, label, spacing in scans:
        voxel_ml = np.prod(spacing) / 1000
        assert 10 < (label == LABELS["LV"]).sum() * voxel_ml < 250
        assert 30 < (label == LABELS["MYO"]).sum() * voxel_ml < 300
        assert 10 < (label == LABELS["RV"]).sum() * voxel_ml < 300
        occupied = np.flatnonzero(label.any(axis=(1, 2)))
        assert label[-1].sum() == 0  # the topmost slice lies above the base
        assert 4 <= len(occupied) == occupied[-1] - occupied[0] + 1
        for part in label[occupied]:
            cavity = part == LABELS["LV"]
            # Muscle encloses the left cavity: no other tissue touches it.
            around = ndimage.binary_dilation(cavity) & ~cavity
            assert (part[around] == LABELS["MYO"]).all()
            assert ndimage.label(part == LABELS["MYO"])[1] == 1
        # The right ventricle lies on the patient's right (+x).
        centre = {name: ndimage.center_of_mass(label == value) for name, value in LABELS.items() if value}
        assert centre["RV"][2] > centre["LV"][2]


def test_the_left_ventricle_empties_and_its_muscle_does_not(
    phantom: Dataset, scans: list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]
) -> None:
    for (ed_case, (_, ed, spacing)), (es_case, (_, es, es_spacing)) in zip(
        list(zip(phantom.cases, scans, strict=True))[::2],
        list(zip(phantom.cases, scans, strict=True))[1::2],
        strict=True,
    ):
        assert (ed_case.metadata["phase"], es_case.metadata["phase"]) == ("ED", "ES")
        assert spacing == es_spacing
        ejected = 1 - (es == LABELS["LV"]).sum() / (ed == LABELS["LV"]).sum()
        assert 0.25 < ejected < 0.75
        assert (es == LABELS["MYO"]).sum() / (ed == LABELS["MYO"]).sum() == pytest.approx(1, abs=0.35)


def test_blood_is_brighter_than_muscle_but_intensity_alone_is_not_enough(
    scans: list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]],
) -> None:
    for image, label, _ in scans:
        blood, muscle = image[label == LABELS["LV"]], image[label == LABELS["MYO"]]
        assert blood.mean() > 1.4 * muscle.mean()
        # Much of the scan is as bright as blood without being blood, so that a threshold does not solve the task.
        alike = (image > np.percentile(blood, 20)) & (image < np.percentile(blood, 80))
        assert (label[alike] == LABELS["background"]).mean() > 0.2


def test_vendors_differ(
    phantom: Dataset, scans: list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]
) -> None:
    ratio: dict[str, list[float]] = {}
    for case, (image, label, _) in zip(phantom.cases, scans, strict=True):
        contrast = np.median(image[label == LABELS["LV"]]) / np.median(image[label == LABELS["MYO"]])
        ratio.setdefault(case.metadata["vendor"], []).append(float(contrast))
    assert min(ratio["C"]) > max(ratio["D"])
    assert min(ratio["A"]) > max(ratio["D"])
