"""The verbs that train many networks: what they leave, that they go on where they were, what they refuse."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from utnetv2_fast.data.phantom import write_phantom
from utnetv2_fast.errors import DivergedError
from utnetv2_fast.evaluation.tables import read_tables
from utnetv2_fast.study import folder as study_folder
from utnetv2_fast.study.folder import StudyFolder
from utnetv2_fast.training import loop

# surface-distance 0.1 reaches scipy.ndimage through names that SciPy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")

Call = Callable[..., int]
SHORT = ("--epochs", 1, "--steps-per-epoch", 1, "--batch-size", 2, "--held-out", "subset=testing", "--device", "cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the dataset `demo` of six patients, two of them, of vendors C and D, to be held out."""
    write_phantom(tmp_path / "demo", patients=6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "_NORM_BATCHES", 1)
    monkeypatch.setattr(loop, "_LEAST_VALIDATION_BATCHES", 1)
    return tmp_path


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_comparison_goes_on_takes_more_and_is_split_by_domain(
    call: Call, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("compare", "--data", "demo", "--preset", "tiny-2d", *SHORT, "--out", "study", "--json")
    assert call(*common, "--models", "utnetv2") == 0
    weights = StudyFolder(place / "study").run(study_folder.Trial("utnetv2", 0, 0)).weights_file("last")
    made = weights.stat().st_mtime_ns
    capsys.readouterr()
    assert call(*common, "--models", "resunet,utnetv2") == 0
    assert weights.stat().st_mtime_ns == made
    shown = json.loads(capsys.readouterr().out)
    assert [entry["network"] for entry in shown["results"]] == ["resunet", "utnetv2"]
    assert len(shown["sentences"]) == 2  # who leads, by Dice and by HD95
    lines = rows(place / "study" / "trials.csv")
    assert {(line["network"], line["class"]) for line in lines} == {
        (network, label) for network in ("resunet", "utnetv2") for label in ("RV", "MYO", "LV")
    }
    evaluation = read_tables(place / "study" / "utnetv2" / "seed-0" / "fold-0" / "validation")
    told = {line["class"]: float(line["dice"]) for line in lines if line["network"] == "utnetv2"}
    assert told == {label: pytest.approx(evaluation.summary(label, "dice").mean, rel=1e-5) for label in told}
    assert {case[:10] for case in evaluation.cases} == {"patient003", "patient004"}
    everything = next(entry for entry in shown["results"] if entry["network"] == "utnetv2")
    assert everything["dice"]["mean"]["mean"] == pytest.approx(evaluation.mean("dice"), rel=1e-5)
    page = (place / "study" / "report.html").read_text()
    assert len(list((place / "study" / "pictures").glob("*.png"))) == 3
    assert page.count("data:image/png") == 4  # and the convergence
    assert str(place) not in (place / "study" / "tables.md").read_text()

    assert call("domains", "study", "--by", "vendor", "--json") == 0
    by_vendor = json.loads(capsys.readouterr().out)["results"]
    assert [(entry["vendor"], entry["seen"], entry["scans"]) for entry in by_vendor[::2]] == [
        ("C", False, 2),
        ("D", False, 2),
    ]
    assert (
        "| network | C (unseen, 2 scans) | D (unseen, 2 scans) |"
        in (place / "study" / "domains-vendor" / "tables.md").read_text()
    )
    assert (place / "study" / "domains-vendor" / "domains.png").stat().st_size > 1000
    assert call("domains", "study", "--by", "phase", "--json") == 0
    assert all(entry["seen"] for entry in json.loads(capsys.readouterr().out)["results"])

    assert call(*common, "--models", "utnetv2", "--epochs", 2) == 2
    assert "begun with other settings (recipe)" in capsys.readouterr().err


def test_a_curve_has_nested_parts_and_one_test_set(call: Call, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("curve", "--data", "demo", "--models", "utnetv2", "--percent", "100,25", *SHORT, "--out", "c") == 0
    runs = {run.config.share_of_patients: run.config for run in StudyFolder(place / "c").runs()}
    assert set(runs) == {0.25, 1.0}
    assert set(runs[0.25].train_cases) < set(runs[1.0].train_cases)
    assert len(runs[0.25].train_cases) == 2
    assert runs[0.25].held_out_cases == runs[1.0].held_out_cases
    assert (place / "c" / "curve.png").stat().st_size > 1000
    assert "| network | 25% (2 scans) | 100% (8 scans) |" in (place / "c" / "tables.md").read_text()


def test_an_ablation_by_minutes_times_every_variant_first(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "_TIMED_SECONDS", 0.0)
    monkeypatch.setattr(loop, "_TIMED_STEPS", 1)
    options = ("--data", "demo", *SHORT[:2], *SHORT[4:], "--minutes", 0.01, "--out", "a")
    assert call("ablate", "attention", *options) == 0
    study = StudyFolder(place / "a")
    for network in ("utnetv2", "utnetv2-identity"):
        budget = study.budget(network)
        assert budget is not None
        assert budget.steps_per_epoch == max(1, round(0.6 / budget.seconds_per_step))
        [run] = [run for run in study.runs() if run.config.network == network]
        assert run.config.training.steps_per_epoch == budget.steps_per_epoch
    assert "identity for B-MHA" in capsys.readouterr().out


def test_a_training_that_fails_is_named_and_the_others_go_on(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case of a domain with a name that is a path is shown without leaving the folder."""
    table = place / "demo" / "cases.csv"
    table.write_text(table.read_text().replace(",C,", ",../../C [b],"))
    step = loop._step

    def fail(state: Any, network: Any, *arguments: Any) -> float:
        if type(state.model).__name__ == "HybridUNet":
            raise DivergedError("Step 0: the loss (nan) is not finite.")
        return step(state, network, *arguments)

    monkeypatch.setattr(loop, "_step", fail)
    arguments = (
        "compare",
        "--data",
        "demo",
        "--preset",
        "tiny-2d",
        "--models",
        "resunet,utnetv2",
        *SHORT,
        "--out",
        "s",
    )
    assert call(*arguments) == 1
    captured = capsys.readouterr()
    assert "1 of 2 failed. Failed: resunet, seed 0, fold 0: Step 0: the loss (nan)" in captured.err
    assert "UTNetV2" in captured.out
    monkeypatch.setattr(loop, "_step", step)
    assert call(*arguments) == 1  # the same would come of it
    (place / "s" / "resunet" / "seed-0" / "fold-0" / "failed.txt").unlink()
    assert call(*arguments) == 0
    assert call("domains", "s") == 0
    assert "../../C [b] (unseen, 2 scans)" in (place / "s" / "domains-vendor" / "tables.md").read_text()
    pictures = {file.name for file in (place / "s" / "domains-vendor" / "pictures").iterdir()}
    assert pictures == {"0-vendor-C-b-.png", "1-vendor-D.png"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "--models", "unetr"), "no network 'unetr' in 2D; choose one of utnetv2"),
        (("compare", "--models", ","), "names nothing"),
        (("compare", "--folds", "x"), "--folds x"),
        (("compare", "--folds", "7"), "no fold 7"),
        (("compare", "--minutes", "1", "--steps-per-epoch", "2"), "leave --steps-per-epoch out"),
        (("compare", "--models", "swinunet-pretrained"), "--pretrained swinunet=FILE"),
        (("compare", "--models", "unet-pretrained", "--pretrained", "unet=a.pth"), "takes no pre-trained weights"),
        (("compare", "--pretrained", "a.pth"), "--pretrained a.pth"),
        (("compare", "--held-out", "vendor"), "--held-out vendor"),
        (("compare", "--held-out", "vendor=Z"), "None of the 4"),
        (("curve", "--percent", "0,10"), "--percent 0,10"),
        (("curve", "--percent", "ten"), "--percent ten"),
        (("ablate", "everything"), "no group 'everything'; choose of ladder"),
        (("domains", "demo"), "no finished run"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    arguments: tuple[str, ...],
    words: str,
    call: Call,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = () if arguments[0] == "domains" else ("--data", "demo", "--preset", "tiny-2d", "--out", "s")
    assert call(*arguments, *data) == 2
    assert words in capsys.readouterr().err


def test_the_demo_dataset_of_any_size_is_never_written_over(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("demo", tmp_path / "d", "--patients", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["cases"] == 4
    assert call("demo", tmp_path / "d") == 2
    assert "is there already" in capsys.readouterr().err
