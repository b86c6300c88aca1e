"""`evaluate` prints and writes the scores and says in one sentence why it cannot."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from utnetv2_fast.cli.evaluate import evaluate, score_table
from utnetv2_fast.evaluation.metrics import DEFAULT_TOLERANCE, Evaluation, Score

# surface-distance 0.1 reaches scipy.ndimage through names that SciPy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")

Call = Callable[..., int]


def test_a_perfect_prediction_scores_one(
    call: Call, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = tmp_path / "predictions"
    shutil.copytree(demo / "labelsTr", predictions)
    assert call("evaluate", predictions, demo, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mean"] == {"dice": 1.0, "hd95_mm": 0.0, "nsd": 1.0}
    assert result == json.loads((predictions / "scores.json").read_text())
    assert (predictions / "scores.csv").is_file()

    assert call("evaluate", predictions, demo / "labelsTr", "--out", tmp_path / "scores", "--tolerance", 3) == 0
    text = capsys.readouterr().out
    for word in ("RV", "MYO", "LV", "mean", "1.000", "NSD (3 mm)"):
        assert word in text
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["nsd_tolerance_mm"] == 3


def test_a_report_is_written_where_it_is_asked_for(
    call: Call, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a" / "r.html"
    for references in (demo, demo / "labelsTr"):
        assert call("evaluate", demo / "labelsTr", references, "--out", tmp_path, "--report", file) == 0
        page = file.read_text(encoding="utf-8")
        assert "<strong>Protocol: not recorded.</strong>" in page
        assert "percentile of what is shown" in page  # the scans are in the pictures
    assert call("evaluate", demo / "labelsTr", demo, "-o", tmp_path, "--report", tmp_path) == 2
    assert "name another path" in capsys.readouterr().err


def test_a_missing_prediction_is_an_error_or_a_subset(
    call: Call, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = tmp_path / "predictions"
    shutil.copytree(demo / "labelsTr", predictions)
    missing = sorted(predictions.iterdir())[0]
    missing.unlink()
    assert call("evaluate", predictions, demo) == 2
    error = capsys.readouterr().err
    assert missing.name in error
    assert "--subset" in error
    assert not (predictions / "scores.csv").exists()
    assert call("evaluate", predictions, demo, "--subset", "--json") == 0
    assert json.loads(capsys.readouterr().out)["cases"] == 3


def test_the_table_says_what_is_undefined() -> None:
    nan = float("nan")
    scores = (Score("a", "LV", 0.5, 12.0, 0.25, 1, 1), Score("a", "RV", nan, nan, nan, 0, 0))
    console = Console(width=100)
    with console.capture() as captured:
        console.print(score_table(Evaluation(("LV", "RV"), 2.0, scores)))
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in captured.get().splitlines()]
    assert ["LV", "0.500", "12.00", "0.250", "1"] in rows
    assert ["RV", "-", "-", "-", "0"] in rows
    assert ["mean", "0.500", "12.00", "0.250", "1"] in rows


def test_the_default_tolerance_is_the_librarys() -> None:
    assert inspect.signature(evaluate).parameters["tolerance"].default == DEFAULT_TOLERANCE
