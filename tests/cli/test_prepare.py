"""`prepare` writes a folder that can be trained on, where it is told or where `train` looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from utnetv2_fast.data.prepare import Prepared


def test_where_it_is_told(
    demo: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("prepare", demo, "--dimensions", 2, "--out", out, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["folder"], answer["cases"]) == (str(out), 4)
    assert answer["plan"] == Prepared.load(out).plan.model_dump(mode="json")
    assert answer["plan"]["dimensions"] == 2


def test_where_nobody_says(
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("prepare", demo) == 0
    assert Prepared.load(tmp_path / "prepared/demo-3d").plan.dimensions == 3
    assert "prepared/demo-3d: 4 cases" in capsys.readouterr().out


def test_bad_input(demo: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    scan = next((demo / "imagesTr").iterdir())
    scan.write_bytes(scan.read_bytes()[:-40])
    assert call("prepare", demo, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{scan}: truncated" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert call("prepare", demo, "--dimensions", 4) == 2


def test_one_rank_speaks_for_all(
    demo: Path,
    tmp_path: Path,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert call("prepare", demo, "--out", tmp_path / "out", "--json") == 0
        text = capsys.readouterr().out
        assert text == "" if rank else json.loads(text)["cases"] == 4
    monkeypatch.setenv("RANK", "1")
    assert call("prepare", tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.startswith("error (rank 1): ")
    monkeypatch.setenv("RANK", "2")
    assert call("prepare", demo, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: RANK=2 and WORLD_SIZE=2")
