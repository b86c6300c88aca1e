"""Two processes that train together do what one does with the same batches, end together, and go on in any number."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.errors import InputError
from utnetv2_fast.ranks import ALONE, Ranks
from utnetv2_fast.training import RunFolder, train
from utnetv2_fast.training.parallel import part_of_batch, process_group

MakeRun = Callable[..., RunFolder]
Cases = list[PreparedCase]
Start = Callable[[RunFolder, str], tuple[Path, str]]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@pytest.fixture
def start(tmp_path: Path, cases: Cases) -> Start:
    """start(template, kind): see parallel_training.py; its OUT, and what the processes wrote to stderr."""

    def run(template: RunFolder, kind: str) -> tuple[Path, str]:
        out = tmp_path / kind
        script = Path(__file__).with_name("parallel_training.py")
        done = subprocess.run(
            [sys.executable, script, template.path, cases[0].image_file.parent, out, kind],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return out, done.stderr

    return run


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=atol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("preset", ["tiny-2d", "tiny-3d"])
def test_gradients_and_statistics_are_those_of_the_whole_batch(preset: str, make_run: MakeRun, start: Start) -> None:
    """With batch norm in 2D and instance norm in 3D; the classes' shares differ between the two halves of the batch."""
    out, _ = start(make_run(preset=preset), "gradients")
    one, two = (torch.load(out / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert any("running_var" in name for name in one) == (preset == "tiny-2d")
    for name, expected in one.items():
        atol = 1e-10 * float(expected.abs().max()) + 1e-15  # some gradients are 0 but for rounding
        torch.testing.assert_close(two[name], expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("preset", ["tiny-2d", "tiny-3d"])
def test_two_processes_end_as_one_does(preset: str, make_run: MakeRun, start: Start) -> None:
    template = make_run(preset=preset, epochs=2, steps_per_epoch=2, batch_size=4, learning_rate=1e-3)
    out, _ = start(template, "equal")
    one, two = RunFolder(out / "one"), RunFolder(out / "two")
    for expected, actual in zip(one.read_metrics(), two.read_metrics(), strict=True):
        for name in ("loss", "dice"):
            assert actual[name] == pytest.approx(expected[name], abs=1e-6)
    assert_close(load_file(two.weights_file("last")), load_file(one.weights_file("last")), atol=1e-6)
    states = [torch.load(run.resume_file, weights_only=True) for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert_close(states[1]["model"], states[0]["model"], atol=1e-6)


def test_a_killed_or_stopped_process_ends_all_and_the_run_goes_on(make_run: MakeRun, start: Start) -> None:
    template = make_run(epochs=2, steps_per_epoch=4, batch_size=4, checkpoint_minutes=0)
    out, said = start(template, "ends")
    assert said.count("Rank 0 of 2 has lost another one") == 1
    assert "--resume" in said
    assert "Traceback" not in said
    reached = {
        name: torch.load(RunFolder(out / name).resume_file, weights_only=True)["schedule"]["last_epoch"]
        for name in ("killed", "stopped")
    }
    assert reached == {"killed": 2, "stopped": 3}  # a process that dies after a step was not yet asked about it
    whole = load_file(RunFolder(out / "whole").weights_file("last"))
    for name in ("killed", "stopped"):
        assert_close(load_file(RunFolder(out / f"{name}-two").weights_file("last")), whole, atol=0)
        assert_close(load_file(RunFolder(out / f"{name}-one").weights_file("last")), whole, atol=1e-4)
        assert not list(out.glob(f"{name}*/**/.unfinished*"))


def test_a_batch_that_cannot_be_divided_is_refused(make_run: MakeRun, cases: Cases) -> None:
    run = make_run(batch_size=3)
    with pytest.raises(InputError, match="A batch of 3 cannot be divided evenly among 2 processes"):
        train(run, cases[:2], cases[2:], torch.device("cpu"), ranks=Ranks(0, 2, 0))
    assert [list(part_of_batch(6, Ranks(rank, 3, 0))) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert part_of_batch(3, ALONE) == range(3)


def test_processes_that_torchrun_did_not_start_cannot_train_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start them by torchrun"), process_group(Ranks(0, 2, 0), torch.device("cpu")):
        pass
