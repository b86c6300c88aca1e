"""`attention` writes figures and numbers of each scan, and says in one sentence why it cannot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from utnetv2_fast.data.dataset import read_dataset

Call = Callable[..., int]


def test_every_scan_gets_figures_and_numbers(
    call: Call, run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, out = read_dataset(demo).cases[:2], tmp_path / "attention"
    files = [case.images[0] for case in cases]
    assert call("attention", run, "-i", files[0], "-i", files[1], "-o", out, "--device", "cpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)["cases"]
    stages = ["encoder-2", "encoder-3", "encoder-4", "decoder-3"]
    for case, summary in zip(cases, found, strict=True):
        folder = out / case.name
        assert {file.name for file in folder.iterdir()} == {
            *("overview.png", "similarity.png", "attention.json", "attention.csv"),
            *(f"{stage}-block1.png" for stage in stages),
        }
        assert json.loads((folder / "attention.json").read_text()) == summary
        assert [block["stage"] for block in summary["blocks"]] == stages
        with (folder / "attention.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == sum(len(block["tokens"]) for block in summary["blocks"]) == (2 + 4 + 4 + 4) * 9
        for row in rows:
            shares = {name: float(row[name]) for name in ("background", "RV", "MYO", "LV")}
            assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
            assert row["class"] == max(shares, key=lambda name: shares[name])


def test_a_level_is_chosen_by_name(
    call: Call, run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, out = read_dataset(demo).cases[0].images[0], tmp_path / "attention"
    assert call("attention", run, "-i", scan, "-o", out, "--level", "encoder-3") == 0
    assert "decoder-3" in capsys.readouterr().out  # the numbers are those of all
    assert [file.name for file in out.glob("*/*-block*.png")] == ["encoder-3-block1.png"]


def test_what_cannot_be_shown_exits_with_2(
    call: Call, run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scans = tmp_path / "out", demo / "imagesTr"

    def refused(*arguments: object) -> str:
        assert call("attention", *arguments, "-o", out) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "not a run folder" in refused(demo, "-i", scans)
    assert "nowhere" in refused(run, "-i", tmp_path / "nowhere")
    assert "choose among encoder-2" in refused(run, "-i", scans, "--level", "2")
    out.write_text("")
    assert call("attention", run, "-i", scans, "-o", out) == 2
    assert "a file" in capsys.readouterr().err
