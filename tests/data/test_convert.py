"""The ACDC challenge's layout becomes an nnU-Net folder, all of it or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from utnetv2_fast.data import convert as module
from utnetv2_fast.data.convert import convert_acdc
from utnetv2_fast.errors import InputError


@pytest.fixture
def acdc(tmp_path: Path, write_nifti: Callable) -> Path:
    """Three patients in the challenge's layout."""
    source = tmp_path / "database"
    for number, group in ((1, "DCM"), (2, "NOR"), (13, "RV")):
        folder = source / f"training/patient{number:03d}"
        for frame in (1, 9):
            rng = np.random.default_rng([number, frame])
            stem = f"patient{number:03d}_frame{frame:02d}"
            write_nifti(folder / f"{stem}.nii.gz", rng.integers(0, 255, (9, 8, 4)).astype(np.uint8))
            write_nifti(folder / f"{stem}_gt.nii.gz", rng.integers(0, 4, (9, 8, 4)).astype(np.uint8))
        write_nifti(folder / f"patient{number:03d}_4d.nii.gz", np.zeros((9, 8, 4, 3), np.uint8))
        (folder / "Info.cfg").write_text(f"ED: 1\nES: 9\nGroup: {group}\nHeight: 180.0\nNbFrame: 30\n")
    return source


@pytest.mark.parametrize("inner", [False, True])
def test_layout(inner: bool, acdc: Path, tmp_path: Path) -> None:
    dataset = convert_acdc(acdc / "training" if inner else acdc, tmp_path / "new/acdc")
    assert dataset.labels == {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    assert len(dataset.cases) == 6
    case = dataset.cases[-1]
    assert (case.name, case.patient) == ("patient013_frame09", "patient013")
    assert case.metadata == {"group": "RV", "phase": "ES"}
    original = acdc / "training/patient013/patient013_frame09"
    assert case.images[0].read_bytes() == original.with_name(original.name + ".nii.gz").read_bytes()
    assert case.label.read_bytes() == original.with_name(original.name + "_gt.nii.gz").read_bytes()
    assert not case.images[0].is_symlink()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["acdc"]


def test_done_once(acdc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = convert_acdc(acdc, tmp_path / "acdc")

    def fail(*arguments: object) -> None:
        raise AssertionError("nothing is to be copied again")

    monkeypatch.setattr(module.shutil, "copyfile", fail)
    assert convert_acdc(acdc, tmp_path / "acdc") == first


def test_other_content_is_not_touched(acdc: Path, tmp_path: Path) -> None:
    destination = tmp_path / "acdc"
    convert_acdc(acdc, destination)
    (destination / "labelsTr/patient001_frame01.nii.gz").unlink()
    with pytest.raises(InputError, match="acdc: exists with other content"):
        convert_acdc(acdc, destination)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(InputError, match="mine: exists with other content"):
        convert_acdc(acdc, tmp_path / "mine")
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match="file: exists with other content"):
        convert_acdc(acdc, tmp_path / "file")
    assert (tmp_path / "mine/notes.txt").read_text() == (tmp_path / "file").read_text() == "keep"


def test_an_empty_folder_is_filled(acdc: Path, tmp_path: Path) -> None:
    (tmp_path / "acdc").mkdir()
    assert len(convert_acdc(acdc, tmp_path / "acdc").cases) == 6


def test_stopped_half_way_it_leaves_nothing(acdc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def fail(source: Path, destination: Path) -> None:
        if "patient002" in str(source):
            raise OSError("disk full")
        copy(source, destination)

    monkeypatch.setattr(module.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_acdc(acdc, tmp_path / "new/acdc")
    assert not list((tmp_path / "new").iterdir())


def test_patients_with_one_scan_are_one_patient(acdc: Path, tmp_path: Path) -> None:
    training = acdc / "training"
    for frame in ("01", "09"):
        shutil.copy(
            training / f"patient001/patient001_frame{frame}.nii.gz",
            training / f"patient013/patient013_frame{frame}.nii.gz",
        )
    cases = convert_acdc(acdc, tmp_path / "acdc").cases
    assert [case.patient for case in cases] == ["patient001"] * 2 + ["patient002"] * 2 + ["patient001"] * 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder.parent), "no folder patientNNN"),
        (lambda folder: (folder / "Info.cfg").unlink(), r"Info\.cfg: no such file"),
        (lambda folder: (folder / "Info.cfg").write_text("ED: 1\nGroup: DCM\n"), r"Info\.cfg: lacks ES"),
        (lambda folder: (folder / "Info.cfg").write_text("ED: one\nES: 9\nGroup: DCM\n"), r"Info\.cfg: lacks ED"),
        (lambda folder: (folder / "Info.cfg").write_text("ED: 1\nES: 9\n"), "or Group"),
        (lambda folder: (folder / "Info.cfg").write_bytes(b"\xff\x00"), "lacks ED"),
        (lambda folder: (folder / "Info.cfg").write_text("ED: 1\nES: 7\nGroup: DCM\n"), r"frame07\.nii\.gz: no such"),
        (lambda folder: (folder / "patient002_frame09_gt.nii.gz").unlink(), r"frame09_gt\.nii\.gz: no such"),
        (lambda folder: (folder / "patient002_frame09.nii.gz").write_bytes(b""), r"frame09\.nii\.gz: "),
    ],
)
def test_other_layouts(acdc: Path, tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(acdc / "training/patient002")
    with pytest.raises(InputError, match=words):
        convert_acdc(acdc, tmp_path / "new/acdc")
    assert not (tmp_path / "new").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no folder patientNNN"):
        convert_acdc(tmp_path / "nowhere", tmp_path / "acdc")


def test_real_scans(shared_data: Path, tmp_path: Path) -> None:
    dataset = convert_acdc(shared_data / "acdc", tmp_path / "acdc")
    assert len(dataset.cases) == 160
    # Patients 074 and 076 of the challenge are one scan, annotated twice.
    assert len({case.patient for case in dataset.cases}) == 79
