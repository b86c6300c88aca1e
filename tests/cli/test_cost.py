"""`cost` prints and writes what networks and layers cost, and says in one sentence why it cannot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from utnetv2_fast.costs import operators

Call = Callable[..., int]


def test_networks_become_a_table_and_files(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, out = tmp_path / "scores.csv", tmp_path / "cost"
    scores.write_text("network,dice\nutnetv2,0.91\n")
    arguments = ("cost", "--preset", "tiny-2d", "--model", "utnetv2", "--size", "32x32", "--device", "cpu")
    assert call(*arguments, "--train", "--scores", scores, "-o", out) == 0
    text = capsys.readouterr().out
    assert "tiny-2d, 32x32, batch 1" in text
    assert "step ms" in text
    assert {file.name for file in out.iterdir()} == {"networks.csv", "networks.md", "networks.png"}
    with (out / "networks.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["network"] == "utnetv2"
    assert float(row["step_seconds"]) > 0

    assert call(*arguments, "--json") == 0
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert network["parameters"] == int(row["parameters"])
    assert network["step_seconds"] is None


def test_operators_become_a_table_and_files(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(operators.measure_operators, sides=(8, 16))
    monkeypatch.setattr(operators, "measure_operators", small)
    out = tmp_path / "cost"
    assert call("cost", "--operators", "--channels", "32", "--device", "cpu", "--json", "-o", out) == 0
    found = json.loads(capsys.readouterr().out)["operators"]
    assert [growth["operator"] for growth in found] == list(operators.OPERATORS)
    assert set(found[0]["exponents"]) == {"time", "memory", "paper"}
    assert {file.name for file in out.iterdir()} == {"operators.csv", "operators.md", "operators.png"}


def test_what_cannot_be_measured_exits_with_2(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert call("cost", *arguments) == 2
        return capsys.readouterr().err

    assert "no preset" in refused("--preset", "acdc")
    assert "no network" in refused("--model", "nothing")
    assert "write 256x256" in refused("--size", "large")
    assert "2 positive numbers" in refused("--size", "8x8x8")
    assert "--out" in refused("--scores", tmp_path / "scores.csv")
    assert "no such file" in refused("--scores", tmp_path / "scores.csv", "-o", tmp_path / "out")
    (tmp_path / "scores.csv").write_text("network,dice\nother,0.5\n")
    assert "none of its networks" in refused("--scores", tmp_path / "scores.csv", "-o", tmp_path / "out")
    assert "multiple of 32" in refused("--operators", "--channels", "40")
    assert "leave --model" in refused("--operators", "--model", "utnetv2")
