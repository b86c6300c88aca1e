"""`evaluate` prints and writes the scores and says in one sentence why it cannot."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from utnetv2_fast.cli.evaluate import evaluate, score_table
from utnetv2_fast.evaluation.metrics import DEFAULT_TOLERANCE, Evaluation, Score
from utnetv2_fast.evaluation.tables import write_tables

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


def test_the_rule_for_missing_classes(
    call: Call, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for file in (demo / "labelsTr").iterdir():
        label = nib.load(file)
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), predictions / file.name)
    found = {}
    for rule in ("diagonal", "500mm"):
        assert call("evaluate", predictions, demo, "--missing-class", rule, "--out", tmp_path / rule, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        found[rule] = result["mean"]["hd95_mm"]
        assert result["mean"]["dice"] == 0
        assert rule.removesuffix("mm") in result["missing_class_rule"]
        assert result == json.loads((tmp_path / rule / "scores.json").read_text())
    assert found["500mm"] == 500 != found["diagonal"]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """The run folders of two folds with the scores of two cases each, and one that is not finished."""
    folders = []
    for number, cases in enumerate(("ab", "cd", "")):
        folders.append(tmp_path / f"fold{number}")
        folders[-1].mkdir()
        (folders[-1] / "config.yaml").write_text("")
        scores = tuple(Score(case, "LV", 0.5 + 0.1 * number, 2.0, 0.75, 9, 9) for case in cases)
        if scores:
            write_tables(Evaluation(("LV",), 1.0, scores, ((5, 1), (1, 5))), folders[-1] / "validation")
    return folders


def test_the_folds_of_a_dataset_are_gathered(
    call: Call, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", *runs[:2], "--out", tmp_path / "all", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["runs"]) == [str(run) for run in runs[:2]]
    assert result["pooled"]["cases"] == 4
    assert result["pooled"]["mean"]["dice"] == pytest.approx(0.55)
    assert result["folds"]["dice"] == {"mean": pytest.approx(0.55), "std": pytest.approx(0.1 / 2**0.5)}
    assert result["pooled"] == json.loads((tmp_path / "all" / "scores.json").read_text())
    assert call("evaluate", *runs[:2]) == 0
    text = capsys.readouterr().out
    assert "0.550 ± 0.058" in text  # over the cases
    assert "0.550 ± 0.071" in text  # over the folds
    (tmp_path / "together").mkdir()
    for number in range(2):
        runs[number].rename(tmp_path / "together" / f"fold-{number}")
    assert call("evaluate", tmp_path / "together", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pooled"] == result["pooled"]


def test_folds_that_cannot_be_gathered_are_named(
    call: Call, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (runs, "fold2/validation/scores.json: not there yet"),
        ([runs[0], shutil.copytree(runs[0], tmp_path / "copy")], "held out a"),
        ([runs[0], "--report", tmp_path / "r.html"], "--report needs one folder"),
        ([runs[0], "--missing-class", "500mm"], "--missing-class needs a folder of label maps"),
        ([tmp_path], "Give a folder of label maps"),
    ):
        assert call("evaluate", *arguments) == 2
        assert message in capsys.readouterr().err


def test_one_rank_speaks_for_all(
    call: Call, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = tmp_path / "predictions"
    shutil.copytree(demo / "labelsTr", predictions)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert call("evaluate", predictions, demo, "--json") == 0
        assert (predictions / "scores.csv").exists() == (rank == 0)
        text = capsys.readouterr().out
        assert text == "" if rank else json.loads(text)["cases"] == 4


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
