"""`train` prepares, trains, predicts and scores; goes on where it was stopped; refuses what it cannot use."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from utnetv2_fast.cli import train
from utnetv2_fast.data.dataset import read_dataset
from utnetv2_fast.experiment import suggest_preset
from utnetv2_fast.training import RunFolder, loop
from utnetv2_fast.training.loop import Progress
from utnetv2_fast.training.run_folder import only_training_in

Call = Callable[..., int]
SHORT = ("--preset", "tiny-2d", "--epochs", 1, "--steps-per-epoch", 2, "--batch-size", 2)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_fold_from_scans_to_scores(call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", demo, *SHORT, "--out", "run", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    run = place / "run"
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints/last.safetensors",
        "checkpoints/best.safetensors",
        "validation/scores.csv",
        "validation/scores.json",
        "scores.json",
        "resources.json",
        "report.html",
        "curves.png",
        "pictures/validation.png",
        "pictures/scores.png",
        "pictures/worst.png",
        "pictures/best.png",
    ):
        assert (run / name).is_file(), name
    page = (run / "report.html").read_text(encoding="utf-8")
    for name in ("curves.png", "pictures/scores.png", "pictures/worst.png", "pictures/best.png"):
        assert b64encode((run / name).read_bytes()).decode() in page, name
    assert "<strong>Protocol: clean.</strong>" in page
    scores = json.loads((run / "scores.json").read_text())
    assert result["runs"]["run"] == scores
    assert scores["cases"] == 2
    held_out = sorted((run / "validation").glob("*.nii.gz"))
    for file in held_out:
        reference = nib.load(demo / "labelsTr" / file.name)
        prediction = nib.load(file)
        assert prediction.shape == reference.shape
        np.testing.assert_allclose(prediction.affine, reference.affine, atol=1e-5)
        assert prediction.get_data_dtype() == np.uint8

    assert call("train", "--data", demo, *SHORT, "--out", "run") == 2
    assert "holds a run already" in capsys.readouterr().err
    before = (run / "checkpoints" / "last.safetensors").read_bytes()
    (place / "prepared" / "demo-2d" / "splits.json").unlink()  # the run keeps the cases it was trained on
    assert call("train", "--resume", "--out", "run") == 0
    assert (run / "checkpoints" / "last.safetensors").read_bytes() == before

    scan = demo / "imagesTr" / f"{held_out[0].name.removesuffix('.nii.gz')}_0000.nii.gz"
    assert call("predict", "run", "-i", scan, "-o", "predicted", "--device", "cpu") == 0
    predicted = nib.load(place / "predicted" / held_out[0].name)
    np.testing.assert_array_equal(np.asarray(predicted.dataobj), np.asarray(nib.load(held_out[0]).dataobj))


def test_torchrun_trains_what_one_process_trains(call: Call, demo: Path, place: Path) -> None:
    """From scans to scores and back in: the run is then finished by one process."""
    options = ("train", "--data", demo, *SHORT, "--precision", "float32", "--device", "cpu")
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "utnetv2_fast",
    )
    done = subprocess.run(
        [*torchrun, *map(str, options), "--out", "two", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["runs"]) == ["two"]
    shutil.rmtree(place / "prepared")
    assert call(*options, "--out", "one") == 0
    names = [{str(file.relative_to(run)) for file in run.rglob("*")} for run in (place / "one", place / "two")]
    assert {name for name in names[1] if ".scores" not in name} == names[0]
    one, two = (json.loads((place / run / "metrics.jsonl").read_text()) for run in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    environment = json.loads((place / "two" / "environment.json").read_text())
    assert [entry["processes"] for entry in environment] == [2]
    (place / "two" / "scores.json").unlink()
    assert call("train", "--resume", "--out", "two", "--device", "cpu") == 0


def test_two_trainings_into_one_folder_are_refused(
    call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", "--data", demo, *SHORT, "--out", "run") == 0
    capsys.readouterr()
    for out, arguments in (("run", ("--resume",)), ("new", ("--data", demo, *SHORT))):
        with only_training_in(place / out):
            assert call("train", *arguments, "--out", out) == 2
        error = capsys.readouterr().err
        assert f"{out}: another training (process {os.getpid()} on " in error
        assert "Traceback" not in error
    assert list((place / "new").iterdir()) == []


def test_ranks_that_cannot_train_together_are_refused(
    call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert call("train", "--data", demo, *SHORT, "--batch-size", 3, "--out", "run") == 2
    assert "A batch of 3 cannot be divided" in capsys.readouterr().err
    assert call("train", "--data", demo, *SHORT, "--out", "run") == 2
    assert "start them by torchrun" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_a_run_that_was_stopped_has_a_report_without_scores(
    call: Call, demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise StoppedError

    monkeypatch.setattr("utnetv2_fast.experiment.predict_held_out", stop)
    with pytest.raises(StoppedError):
        call("train", "--data", demo, *SHORT, "--out", "run")
    page = (place / "run" / "report.html").read_text(encoding="utf-8")
    assert "1 of 1 epochs are finished. There are no scores yet" in page
    for name in ("curves.png", "pictures/validation.png"):
        assert b64encode((place / "run" / name).read_bytes()).decode() in page, name


def test_tensorboard_is_written_when_asked_for(
    call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    monkeypatch.setattr("utnetv2_fast.training.tensorboard.require_tensorboard", lambda: None)
    monkeypatch.setattr(
        "utnetv2_fast.run_report.tensorboard_log",
        lambda folder, labels: lambda records: logged.append((folder.name, labels, len(list(records)))),
    )
    assert call("train", "--data", demo, *SHORT, "--out", "without") == 0
    assert logged == []
    assert call("train", "--data", demo, *SHORT, "--out", "with", "--tensorboard") == 0
    assert logged == [("tensorboard", ["RV", "MYO", "LV"], 1)]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert call("train", "--data", demo, *SHORT, "--out", "missing", "--tensorboard") == 2
    assert "pip install" in capsys.readouterr().err
    assert not (place / "missing").exists()


def test_compilation_is_asked_for(call: Call, demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    for name, options in (("without", ()), ("with", ("--compile",))):
        assert call("train", "--data", demo, *SHORT, "--out", name, *options) == 0
        assert yaml.safe_load((place / name / "config.yaml").read_text())["training"]["compile"] is bool(options)
        assert len(compiled) == len(options)


def test_the_paper_protocol_with_leaks_says_so_first(
    call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = RunFolder.load_model
    monkeypatch.setattr(
        RunFolder, "load_model", lambda run, weights="last": asked.append(weights) or load(run, weights)
    )
    file = place / "mine.yaml"
    file.write_text(
        "preset: tiny-2d\npreparation: {spacing: [null, 2, 2], label_context: [1, 9, 9]}\n"
        "training: {epochs: 9, steps_per_epoch: 2, batch_size: 2, learning_rate: 1.0e-3}\n"
        "paper:\n  preparation: {normalisation: percentile_98, crop: none}\n  training: {dice: adaptive}\n"
        "  evaluation: {missing_class: 500mm}\n  split: {scheme: authors}\n"
    )
    options = ("train", "--data", demo, "--recipe", file, "--epochs", 1)
    assert call(*options, "--out", "clean", "--json") == 0
    assert asked == []
    leaks = ("--leak-best-epoch", "--leak-label-crop", "--leak-resampled-grid")
    assert call(*options, "--protocol", "paper", *leaks, "--out", "leaking") == 0
    assert asked == ["best"]
    assert "With leaks: the epoch was chosen" in capsys.readouterr().out

    clean, leaking = (json.loads((place / name / "scores.json").read_text()) for name in ("clean", "leaking"))
    assert (clean["protocol"], clean["leaks"]) == ("clean", [])
    assert leaking["protocol"] == "paper"
    assert len(leaking["leaks"]) == 3
    assert list(leaking)[:2] == ["protocol", "leaks"]
    assert "500 mm" in leaking["missing_class_rule"]
    assert json.loads((place / "leaking/validation/scores.json").read_text()) == leaking
    body = (place / "leaking/report.html").read_text(encoding="utf-8").partition("<body>")[2]
    assert body.split("</p>")[0].startswith(
        '\n<p class="protocol leaks"><strong>Protocol: paper, with leaks: the epoch was chosen on the held-out scans, '
    )
    assert "Protocol: clean.</strong> Data and training" in (place / "clean/report.html").read_text(encoding="utf-8")

    config = yaml.safe_load((place / "leaking/config.yaml").read_text())
    assert (config["training"]["epochs"], config["training"]["dice"]) == (1, "adaptive")
    assert config["plan"]["spacing"] == [None, 2.0, 2.0]
    assert (config["plan"]["crop"], config["plan"]["normalisation"]) == ("label", ["percentile_98"])
    assert len(list((place / "prepared").iterdir())) == 2  # each has its own
    (place / "leaking/scores.json").unlink()
    assert call("train", "--resume", "--out", "leaking") == 0
    assert json.loads((place / "leaking/scores.json").read_text()) == leaking


def test_a_recipe_by_name_is_overridden_by_options(call: Call, demo: Path, place: Path) -> None:
    assert call("train", "--data", demo, "--recipe", "acdc-2d", *SHORT, "--out", "run") == 0
    config = yaml.safe_load((place / "run/config.yaml").read_text())
    assert (config["protocol"], config["preset"], config["training"]["batch_size"]) == ("clean", "tiny-2d", 2)
    assert config["plan"]["spacing"] == [None, 1.5625, 1.5625]
    assert config["training"]["learning_rate"] == 5e-4


def test_pretrained_weights_are_noted_and_reported(
    call: Call, demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, Path]] = []
    monkeypatch.setattr(loop, "load_pretrained", lambda net, file: loaded.append((net.config.architecture, file)))
    file = place / "swin.pth"
    file.touch()
    arguments = ("train", "--data", demo, *SHORT, "--model", "swinunet", "--pretrained", "swin.pth", "--out", "run")
    assert call(*arguments) == 0
    assert loaded == [("swinunet", file)]
    assert RunFolder(place / "run").config.pretrained == str(file)
    page = (place / "run" / "report.html").read_text(encoding="utf-8")
    assert "Weights at the start" in page
    assert str(file) in page


@pytest.mark.parametrize(
    ("model", "file", "words"),
    [("utnetv2", "swin.pth", "takes no pre-trained weights"), ("swinunet", "absent.pth", "absent.pth: no such file")],
)
def test_pretrained_weights_that_cannot_be_used_are_refused_before_a_run_is_written(
    call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str], model: str, file: str, words: str
) -> None:
    (place / "swin.pth").touch()
    assert call("train", "--data", demo, *SHORT, "--model", model, "--pretrained", file, "--out", "run") == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (place / "run").exists()


def test_all_folds_and_their_spread(call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--data", demo, *SHORT, "--fold", "all", "--out", "runs", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["runs"]) == ["runs/fold-0", "runs/fold-1"]
    dice = [run["mean"]["dice"] for run in result["runs"].values()]
    assert result["folds"]["dice"]["mean"] == pytest.approx(np.mean(dice))
    assert result["folds"]["dice"]["std"] == pytest.approx(np.std(dice, ddof=1))


def test_a_dataset_whose_classes_changed_is_not_resumed(
    call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", "--data", demo, *SHORT, "--out", "run") == 0
    (place / "run" / "scores.json").unlink()
    content = json.loads((demo / "dataset.json").read_text())
    content["labels"]["LV"], content["labels"]["RV"] = content["labels"]["RV"], content["labels"]["LV"]
    (demo / "dataset.json").write_text(json.dumps(content))
    assert call("train", "--resume", "--out", "run") == 2
    assert "classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fold", "7"), "no fold 7"),
        (("--fold", "first"), "--fold first"),
        (("--preset", "tiny"), "no preset 'tiny'"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--resume",), "--resume needs --out"),
        (("--augmentation", "wild"), "augmentation"),
        (("--precision", "int4"), "precision"),
        (("--seed", str(2**64)), "seed"),
        (("--out", "demo/dataset.json"), "is a file"),
        (("--recipe", "acdc"), "no recipe 'acdc'"),
        (("--recipe", "demo/dataset.yaml"), "no such recipe file"),
        (("--leak-label-crop",), "needs a recipe with label_context"),
        (("--protocol", "dirty"), "dirty"),
    ],
)
def test_wrong_options_are_one_sentence(
    call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    preset = () if "--preset" in arguments else ("--preset", "tiny-2d")
    assert call("train", "--data", demo, *preset, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (place / "runs").exists()


def steps_that(act: Callable[[int], None]) -> Callable[[], Iterator[Callable[[Progress], None]]]:
    """In place of the progress bar: calls `act` with the number of every step that was taken."""

    @contextmanager
    def bar() -> Iterator[Callable[[Progress], None]]:
        yield lambda progress: act(progress.step)

    return bar


def weights_and_scores(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("checkpoints/last.safetensors", "scores.json")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_training_which_goes_on_to_the_same_end(
    number: signal.Signals,
    call: Call,
    demo: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    handler = signal.getsignal(number)
    assert call("train", "--data", demo, *SHORT, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_bar", steps_that(lambda step: step == 1 and signal.raise_signal(number)))
        assert call("train", "--data", demo, *SHORT, "--out", "a run", "--device", "cpu") == 0
    assert signal.getsignal(number) is handler
    message = capfd.readouterr().err
    assert "once more stops at once" in message
    assert "Stopped after step 1 of 2" in message
    assert not (place / "a run" / "scores.json").exists()
    [command] = re.findall("Go on with `utnetv2-fast (.*)`", message)
    assert shlex.split(command) == ["train", "--resume", "--out", "a run", "--device", "cpu"]
    assert call(*shlex.split(command)) == 0
    assert weights_and_scores(place / "a run") == weights_and_scores(place / "whole")


def test_a_second_interruption_stops_at_once(
    call: Call, demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_twice(step: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "training_bar", steps_that(interrupt_twice))
    assert call("train", "--data", demo, *SHORT, "--out", "run") == 130
    assert not (place / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("work", "go_on"), [("Preparing", "the same command"), ("Predicting", "`utnetv2-fast train --resume --out run`")]
)
def test_a_signal_stops_between_cases(
    work: str,
    go_on: str,
    call: Call,
    demo: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def track(items: Sequence[Any], description: str, /) -> Iterator[Any]:
        for number, item in enumerate(items):
            if description.startswith(work) and number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(train, "show_progress", track)
        assert call("train", "--data", demo, *SHORT, "--out", "run", "--json") == 0
    captured = capsys.readouterr()
    assert f"stopped after 1 of {2 if work == 'Predicting' else 4}. Go on with {go_on}." in captured.err
    assert json.loads(captured.out)["stopped"] in captured.err
    again = ("--resume",) if (place / "run").exists() else ("--data", demo, *SHORT)
    assert call("train", *again, "--out", "run") == 0
    assert (place / "run" / "scores.json").exists()


def test_a_run_killed_while_it_was_set_up_is_set_up_anew(
    call: Call, demo: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all folds some would be missing, so that going on would silently train fewer."""
    everything = ("train", "--data", demo, *SHORT, "--fold", "all", "--out", "runs", "--json")
    assert call(*everything) == 0
    shutil.copy(place / "runs" / "fold-1" / "config.yaml", place / "config.yaml")
    shutil.rmtree(place / "runs")
    (place / "runs" / "fold-1").mkdir(parents=True)
    shutil.move(place / "config.yaml", place / "runs" / "fold-1")
    assert call("train", "--resume", "--out", "runs") == 2
    assert "never begun" in capsys.readouterr().err
    assert call(*everything) == 0
    assert sorted(json.loads(capsys.readouterr().out)["runs"]) == ["runs/fold-0", "runs/fold-1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--epochs", "3"),
        ("--fold", "1"),
        ("--preset", "tiny-2d"),
        ("--recipe", "acdc-2d"),
        ("--pretrained", "weights.pth"),
        ("--protocol", "paper"),
        ("--leak-best-epoch",),
    ],
)
def test_a_resumed_run_keeps_its_settings(
    call: Call, place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert call("train", "--resume", "--out", "run", *arguments) == 2
    assert "leave the others out" in capsys.readouterr().err


def test_preset_is_suggested_by_slice_thickness_for_any_number_of_channels(tmp_path: Path) -> None:
    """Thick slices ask for 2D, cubes for 3D, in one file of several channels too (as some Decathlon sets have)."""
    for spacing, expected in (((1, 1, 8, 1), "tiny-2d"), ((1, 1, 1, 1), "tiny-3d")):
        folder = tmp_path / expected
        for part, shape in (("imagesTr", (8, 8, 8, 2)), ("labelsTr", (8, 8, 8))):
            (folder / part).mkdir(parents=True)
            array = np.arange(np.prod(shape)).reshape(shape) % 2
            nib.save(nib.Nifti1Image(array.astype(np.uint8), np.diag([*spacing[:3], 1])), folder / part / "a.nii.gz")
        content = {
            "modality": {"0": "T1", "1": "T2"},
            "labels": {"0": "background", "1": "lesion"},
            "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        }
        (folder / "dataset.json").write_text(json.dumps(content))
        assert suggest_preset(read_dataset(folder), torch.device("cpu")) == expected
