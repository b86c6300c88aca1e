"""`convert` makes a folder that the other verbs read."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from utnetv2_fast.cli.convert import convert
from utnetv2_fast.data.layouts import LAYOUTS


@pytest.fixture
def acdc(tmp_path: Path) -> Path:
    folder = tmp_path / "database/training/patient001"
    folder.mkdir(parents=True)
    (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\n")
    for frame in (1, 12):
        label = np.arange(60, dtype=np.uint8).reshape(5, 4, 3) % 4
        nib.save(nib.Nifti1Image(label * frame, np.eye(4)), folder / f"patient001_frame{frame:02d}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"patient001_frame{frame:02d}_gt.nii.gz")
    return tmp_path / "database"


def test_convert_then_verify(
    acdc: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("convert", "acdc", acdc, tmp_path / "raw", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"folder": str(tmp_path / "raw"), "layout": "acdc", "cases": 2, "patients": 1}
    assert call("verify", tmp_path / "raw") == 0
    assert "no problem" in capsys.readouterr().out


def test_bad_input(acdc: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert", "acdc", tmp_path / "nowhere", tmp_path / "raw") == 2
    assert "nowhere: no folder patientNNN" in capsys.readouterr().err
    assert call("convert", "acdc", acdc, acdc) == 2
    assert "exists with other content" in capsys.readouterr().err
    assert call("convert", "lits", acdc, tmp_path / "raw") == 2
    assert "no segmentation-N.nii in it" in capsys.readouterr().err
    assert call("convert", "promise12", acdc, tmp_path / "raw") == 2
    assert not (tmp_path / "raw").exists()


def test_the_verb_takes_every_layout() -> None:
    assert set(typing.get_args(typing.get_type_hints(convert)["layout"])) == set(LAYOUTS)
