"""Verification finds every problem of every case, each in a sentence that names its file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from utnetv2_fast.data.dataset import read_dataset
from utnetv2_fast.data.verify import find_problems


def test_a_good_dataset_has_no_problem(tmp_path: Path, make_dataset: Callable, make_affine: Callable) -> None:
    affine = make_affine((2, 0, 1), (-1, 1, -1), (1, 2, 3), (0.1, 0.1, 0))
    assert find_problems(read_dataset(make_dataset(tmp_path, affine=affine, channels=("a", "b")))) == []


def test_every_problem_is_found(tmp_path: Path, make_dataset: Callable, write_nifti: Callable) -> None:
    folder = make_dataset(tmp_path, cases=9, classes=3)
    images, labels = folder / "imagesTr", folder / "labelsTr"

    def changed(file: Path, change: Callable[[np.ndarray], object], affine: np.ndarray | None = None) -> None:
        array = np.asarray(nib.load(file).dataobj).copy()
        result = change(array)
        write_nifti(file, array if result is None else result, affine)

    (images / "CASE00_0000.nii.gz").write_bytes((images / "CASE00_0000.nii.gz").read_bytes()[:-200])
    (labels / "CASE00.nii.gz").write_bytes(b"no scan")
    changed(images / "CASE01_0000.nii.gz", lambda a: np.put(a, 7, np.nan))
    changed(images / "CASE02_0000.nii.gz", lambda a: np.stack([a, a], -1))
    changed(labels / "CASE03.nii.gz", lambda a: np.put(a, [7, 8, 9], [77, 99, 77]))
    changed(labels / "CASE04.nii.gz", lambda a: a[:-1])
    changed(labels / "CASE05.nii.gz", lambda a: None, np.diag([1, 1, 2, 1]))
    changed(labels / "CASE05.nii.gz", lambda a: np.put(a, 7, 66), np.diag([1, 1, 2, 1]))
    changed(images / "CASE06_0000.nii.gz", lambda a: a * 0 + 3)
    shutil.copy(images / "CASE07_0000.nii.gz", images / "CASE08_0000.nii.gz")
    for file in labels.iterdir():
        if file.name != "CASE00.nii.gz":
            affine = nib.load(file).affine
            changed(file, lambda a: np.putmask(a, a == 3, 2), affine)
    expected = [
        ("CASE00_0000.nii.gz", "truncated"),
        ("CASE00.nii.gz", "NIfTI|gz"),
        ("CASE01_0000.nii.gz", "NaN"),
        ("CASE02_0000.nii.gz", "2 volumes"),
        ("CASE03.nii.gz", "(77, 99)"),
        ("CASE04.nii.gz", "shape"),
        ("CASE05.nii.gz", "(66)"),
        ("CASE05.nii.gz", "spacing"),
        ("CASE06_0000.nii.gz", "one value"),
        ("CASE08_0000.nii.gz", "same scan as CASE07"),
        ("dataset.json", "class3 (value 3)"),
    ]
    problems = find_problems(read_dataset(folder))
    assert len(problems) == len(expected)
    for problem, (file, words) in zip(problems, expected, strict=True):
        assert file in problem.split(": ")[0]
        assert any(word in problem for word in words.split("|")), problem
        assert "\n" not in problem


def test_one_patient_may_have_one_scan_twice(tmp_path: Path, make_dataset: Callable) -> None:
    folder = make_dataset(tmp_path, patients={"CASE00": "A", "CASE01": "A", "CASE02": "B"})
    shutil.copy(folder / "imagesTr/CASE00_0000.nii.gz", folder / "imagesTr/CASE01_0000.nii.gz")
    assert find_problems(read_dataset(folder)) == []
    shutil.copy(folder / "imagesTr/CASE00_0000.nii.gz", folder / "imagesTr/CASE02_0000.nii.gz")
    assert len(find_problems(read_dataset(folder))) == 1


def test_a_label_map_stored_in_another_orientation_is_fine(
    tmp_path: Path, make_dataset: Callable, write_nifti: Callable
) -> None:
    folder = make_dataset(tmp_path)
    file = folder / "labelsTr/CASE00.nii.gz"
    turned = nib.load(file).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    write_nifti(file, np.asarray(turned.dataobj), turned.affine)
    assert find_problems(read_dataset(folder)) == []


def test_real_scans(shared_data: Path) -> None:
    assert find_problems(read_dataset(shared_data / "hippocampus")) == []
