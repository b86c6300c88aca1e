"""The tables say what the evaluation says, and a machine can read them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.metrics import Evaluation, Score
from utnetv2_fast.evaluation.tables import summarise, write_tables

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
