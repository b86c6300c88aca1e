"""`prepare` writes a folder that can be trained on, where it is told or where `train` looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from utnetv2_fast.data.dataset import read_dataset
from utnetv2_fast.data.prepare import Prepared, default_folder
from utnetv2_fast.training.recipe import load_recipe


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


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_by_a_recipe_where_train_looks(
    protocol: str,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("prepare", demo, "--recipe", "acdc-2d", "--protocol", protocol, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    preparation = load_recipe("acdc-2d", protocol).preparation
    assert Path(answer["folder"]) == default_folder(read_dataset(demo), 2, preparation)
    plan = Prepared.load(tmp_path / answer["folder"]).plan
    assert (plan.dimensions, plan.spacing, plan.resampling) == (2, preparation.spacing, preparation.resampling)
    changed = tmp_path / "mine.yaml"
    training = "{epochs: 1, steps_per_epoch: 1, batch_size: 1, learning_rate: 0.1}"
    changed.write_text(f"preset: tiny-3d\npreparation: {{spacing: [9, 4, 4]}}\ntraining: {training}\n")
    assert call("prepare", demo, "--recipe", changed, "--out", tmp_path / "out", "--dimensions", 3) == 0
    assert Prepared.load(tmp_path / "out").plan.spacing == (9, 4, 4)


def test_the_label_crop_of_a_recipe(demo: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    recipe = ("--recipe", "bcv-3d", "--protocol", "paper")
    assert call("prepare", demo, *recipe, "--leak-label-crop", "--out", tmp_path / "out") == 0
    assert Prepared.load(tmp_path / "out").plan.crop == "label"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--protocol", "paper"), "name it with --recipe"),
        (("--leak-label-crop",), "name it with --recipe"),
        (("--recipe", "acdc-2d", "--dimensions", 3), "leave --dimensions 3 out"),
        (("--recipe", "acdc"), "no recipe 'acdc'"),
        (("--recipe", "acdc-2d", "--leak-label-crop"), "needs a recipe with label_context"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: tuple,
    words: str,
    demo: Path,
    tmp_path: Path,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("prepare", demo, "--out", tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
