"""The tables say what the evaluation says, and a machine can read them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.metrics import Evaluation, Score
from utnetv2_fast.evaluation.tables import markdown_table, read_tables, summarise, write_tables

EVALUATION = Evaluation(
    ("left, inner", "right"),
    2.0,
    (
        Score("a", "left, inner", 0.5, 2.0, 1.0, 10, 12),
        Score("a", "right", math.nan, math.nan, math.nan, 0, 0),
        Score("b", "left, inner", 1 / 3, 4.0, 0.5, 7, 0),
        Score("b", "right", math.nan, math.nan, math.nan, 0, 0),
    ),
    ((99, 1, 0), (5, 12, 0), (0, 0, 0)),
)


def test_csv_has_a_line_per_case_and_class(tmp_path: Path) -> None:
    write_tables(EVALUATION, tmp_path / "new" / "folder")
    with (tmp_path / "new" / "folder" / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["case"], row["class"]) for row in rows] == [(s.case, s.label) for s in EVALUATION.scores]
    assert float(rows[2]["dice"]) == pytest.approx(1 / 3, abs=1e-6)
    assert (rows[0]["hd95_mm"], rows[0]["nsd"]) == ("2", "1")
    assert (rows[0]["reference_voxels"], rows[0]["predicted_voxels"]) == ("10", "12")
    assert (rows[1]["dice"], rows[1]["hd95_mm"], rows[1]["nsd"]) == ("", "", "")


def test_json_is_strict_json_with_null_for_what_is_undefined(tmp_path: Path) -> None:
    write_tables(EVALUATION, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)
    assert content == summarise(EVALUATION)
    assert content["cases"] == 2
    assert content["confusion_voxels"] == [[99, 1, 0], [5, 12, 0], [0, 0, 0]]
    assert content["nsd_tolerance_mm"] == 2.0
    assert content["classes"]["left, inner"]["hd95_mm"] == {"mean": 3.0, "std": pytest.approx(math.sqrt(2)), "cases": 2}
    assert content["classes"]["right"]["dice"] == {"mean": None, "std": None, "cases": 0}
    assert content["mean"]["dice"] == pytest.approx((0.5 + 1 / 3) / 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scores.csv", "scores.json"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("")
    with pytest.raises(InputError, match="scores: a file"):
        write_tables(EVALUATION, tmp_path / "scores")


def test_protocol_and_leaks_come_first_and_the_rule_is_the_one_that_held() -> None:
    evaluation = replace(EVALUATION, protocol="paper", leaks=("it knew",), missing_class="500mm")
    summary = summarise(evaluation)
    assert list(summary)[:2] == ["protocol", "leaks"]
    assert (summary["protocol"], summary["leaks"]) == ("paper", ["it knew"])
    assert "500 mm" in summary["missing_class_rule"]
    assert "diagonal" in summarise(EVALUATION)["missing_class_rule"]
    assert "protocol" not in summarise(EVALUATION)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = replace(EVALUATION, protocol="paper", leaks=("it knew",), missing_class="500mm")
    write_tables(written, tmp_path)
    found = read_tables(tmp_path)
    assert replace(found, scores=()) == replace(written, scores=())
    for score, expected in zip(found.scores, written.scores, strict=True):
        assert (score.case, score.label) == (expected.case, expected.label)
        assert astuple(score)[2:] == pytest.approx(astuple(expected)[2:], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", ["scores.csv", "scores.json"])
def test_tables_that_are_missing_or_damaged_are_named(tmp_path: Path, name: str) -> None:
    write_tables(EVALUATION, tmp_path)
    text = (tmp_path / name).read_text()
    for damage in (text[: len(text) // 2], text.replace("2", "x"), "[]", "\0"):
        (tmp_path / name).write_text(damage)
        with pytest.raises(InputError, match=r"scores\.json is damaged"):
            read_tables(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name}: not there yet"):
        read_tables(tmp_path)


def test_markdown_keeps_cells_apart_and_puts_numbers_to_the_right() -> None:
    assert markdown_table(["a|b", "c"], [["1", "2"]]) == "| a\\|b | c |\n|---|--:|\n| 1 | 2 |\n"
