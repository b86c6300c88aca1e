"""`verify` prints every problem and exits with 2 when there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_a_good_dataset(demo: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", demo) == 0
    assert "4 cases of 2 patients, no problem" in capsys.readouterr().out
    assert call("verify", demo, "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_every_problem_is_printed(demo: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    scans = sorted((demo / "imagesTr").iterdir())
    scans[0].write_bytes(b"[/red] no scan")
    scans[1].unlink()
    labels = sorted((demo / "labelsTr").iterdir())
    labels[2].write_bytes(labels[2].read_bytes()[:-40])
    assert call("verify", demo) == 2
    lines = capsys.readouterr().out.splitlines()
    for file in (scans[0], scans[1].name.removesuffix("_0000.nii.gz"), labels[2]):
        assert sum(str(file) in line for line in lines) == 1, file
    assert "3 problem(s)" in lines[-1]
    assert call("verify", demo, "--json") == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 3


def test_no_dataset(tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}: no dataset.json" in error
    assert len(error.splitlines()) == 1
