"""`predict` writes one label map per scan and says in one sentence why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from utnetv2_fast.data.dataset import read_dataset

Call = Callable[..., int]


def test_a_folder_of_scans_becomes_a_folder_of_label_maps(
    call: Call, run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions"
    assert call("predict", run, "-i", demo / "imagesTr", "-o", out, "--device", "cpu", "--json") == 0
    cases = read_dataset(demo).cases
    expected = {case.name: str(out / f"{case.name}.nii.gz") for case in cases}
    assert json.loads(capsys.readouterr().out) == {"predictions": expected, "kept": []}
    for case in cases:
        scan, label = nib.load(case.images[0]), nib.load(expected[case.name])
        assert label.shape == scan.shape
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_allclose(label.affine, scan.affine, atol=1e-5)
    assert len(list(out.iterdir())) == len(cases)

    (out / f"{cases[0].name}.nii.gz").unlink()
    assert call("predict", run, "-i", demo / "imagesTr", "-o", out, "--device", "cpu") == 0
    assert f"{len(cases)} label maps, {len(cases) - 1} of them there already" in capsys.readouterr().out
    assert call("predict", run, "-i", demo / "imagesTr", "-o", out, "--device", "cpu", "--mirror") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call("predict", run, "-i", demo / "imagesTr", "-o", out, "--device", "cpu", "--overwrite") == 0
    assert f"{len(cases)} label maps." in capsys.readouterr().out


def test_one_rank_speaks_for_all(
    call: Call,
    run: Path,
    demo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("predict", run, "-i", demo / "imagesTr", "-o", tmp_path / "out", "--json")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for rank in (1, 0):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        assert call(*arguments) == 0
        text = capsys.readouterr().out
        assert text == "" if rank else len(json.loads(text)["predictions"]) == 4
    assert call(*arguments, "--overwrite") == 2
    assert "--overwrite is for a single process" in capsys.readouterr().err


def test_files_as_a_shell_spreads_them(call: Call, run: Path, demo: Path, tmp_path: Path) -> None:
    files = [case.images[0] for case in read_dataset(demo).cases]
    assert call("predict", run, "-i", *files[:3], "-o", tmp_path / "out", "--device", "cpu") == 0
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_an_ensemble_of_one_run_twice_is_that_run(call: Call, run: Path, demo: Path, tmp_path: Path) -> None:
    scan = read_dataset(demo).cases[0].images[0]
    for out, runs in (("one", [run]), ("two", [run, run])):
        assert call("predict", *runs, "-i", scan, "-o", tmp_path / out, "--device", "cpu") == 0
    labels = [np.asarray(nib.load(next((tmp_path / out).iterdir())).dataobj) for out in ("one", "two")]
    np.testing.assert_array_equal(*labels)


def test_a_damaged_scan_is_named_and_the_others_are_done(
    call: Call, run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = read_dataset(demo).cases[1].images[0]
    damaged.write_bytes(damaged.read_bytes()[:300])
    assert call("predict", run, "-i", demo / "imagesTr", "-o", tmp_path / "out", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 1 of 4 scans")
    assert str(damaged) in error
    assert "Traceback" not in error
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_what_cannot_be_predicted_exits_with_2(
    call: Call, run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scans = tmp_path / "out", demo / "imagesTr"

    def refused(*arguments: object) -> str:
        assert call("predict", *arguments, "-o", out) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "not a run folder" in refused(demo, "-i", scans)
    assert "nowhere" in refused(run, "-i", tmp_path / "nowhere")
    assert "best" in refused(run, "-i", scans, "--weights", "best")
    assert "device" in refused(run, "-i", scans, "--device", "gpu")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("LV: 3", "LV: 3, atrium: 4"))
    assert "other classes" in refused(other, "-i", scans)
    assert str(other) in refused(run, other, "-i", scans)
