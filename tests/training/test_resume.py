"""A training that was stopped, killed or failed to write, and went on, ends with the bits of one that never stopped."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.errors import InputError, RunError, Stopped
from utnetv2_fast.training import RunFolder, loop, train

CPU = torch.device("cpu")
MakeRun = Callable[..., RunFolder]
Kill = Callable[..., list[RunFolder]]
Cases = list[PreparedCase]
FILES = {
    "config.yaml",
    "metrics.jsonl",
    "checkpoints/last.safetensors",
    "checkpoints/best.safetensors",
    "checkpoints/resume.pt",
}


def fit(run: RunFolder, cases: Cases, **options: object) -> torch.nn.Module:
    return train(run, cases[:2], cases[2:], CPU, **options)  # type: ignore[arg-type]


def stop_after(steps: int) -> Callable[[], bool]:
    """A `stop` for a training in one go that is true after `steps` steps."""
    asked = iter(range(1, steps + 1))
    return lambda: next(asked) == steps


def content(run: RunFolder) -> dict[str, Any]:
    """What a run folder holds, file by file, without the times that its steps took."""
    files = {str(file.relative_to(run.path)): file for file in run.path.rglob("*") if file.is_file()}
    read = {}
    for name, file in files.items():
        if name == "metrics.jsonl":
            read[name] = [json.loads(line) | {"seconds": None} for line in file.read_text().splitlines()]
        elif file.suffix == ".pt":
            state = torch.load(file, weights_only=True)
            records = [record | {"seconds": None} for record in state["records"]]
            read[name] = plain(state | {"records": records, "seconds": None})
        else:
            read[name] = file.read_bytes()
    return read


def plain(value: Any) -> Any:
    """`value` with tensors as their type, shape and bytes, which `==` compares exactly."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def assert_same(run: RunFolder, whole: RunFolder) -> None:
    found, expected = content(run), content(whole)
    assert set(found) == set(expected) == FILES
    for name in FILES:
        assert found[name] == expected[name], f"{run.path / name}"


@pytest.fixture(autouse=True)
def _few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between epochs, as for `finished`."""
    monkeypatch.setattr(loop, "_NORM_BATCHES", 1)
    monkeypatch.setattr(loop, "_LEAST_VALIDATION_BATCHES", 1)


@pytest.fixture
def new_run(make_run: MakeRun) -> MakeRun:
    """new_run(**settings): one that will end as `finished` did, unless the settings change its result."""
    return lambda **settings: make_run(**{"epochs": 2, "steps_per_epoch": 3} | settings)


@pytest.fixture
def kill(tmp_path: Path, cases: Cases) -> Kill:
    """kill(template, kind, seed=0): see killed_training.py; the run that was never stopped, then the killed ones."""

    def run(template: RunFolder, kind: str, seed: int = 0) -> list[RunFolder]:
        out = tmp_path / kind
        script = Path(__file__).with_name("killed_training.py")
        arguments = (template.path, cases[0].image_file.parent, out, kind, seed)
        done = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        numbered = sorted((folder for folder in out.iterdir() if folder.name != "whole"), key=lambda f: int(f.name))
        return [RunFolder(out / "whole"), *map(RunFolder, numbered)]

    return run


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@needs_fork
def test_killed_at_random_instants(make_run: MakeRun, kill: Kill) -> None:
    whole, *killed = kill(make_run(epochs=3, steps_per_epoch=6, checkpoint_minutes=0.03 / 60), "times")
    assert len(killed) == 20
    for run in killed:
        assert_same(run, whole)


@needs_fork
def test_killed_before_and_after_every_write(make_run: MakeRun, kill: Kill) -> None:
    whole, *killed = kill(make_run(epochs=2, steps_per_epoch=2, checkpoint_minutes=0), "writes")
    assert len(killed) >= 2 * (2 * (2 + 3) + 1)  # states of two steps; state, weights and metrics; the best weights
    for run in killed:
        assert_same(run, whole)


@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_stopped_after_a_step(new_run: MakeRun, cases: Cases, finished: RunFolder, steps: int) -> None:
    """Within an epoch, at the end of one before its validation, and after the last step."""
    run = new_run()
    with pytest.raises(Stopped, match=f"after step {steps} of 6"):
        fit(run, cases, stop=stop_after(steps))
    assert len(run.read_metrics()) == (steps - 1) // 3
    fit(run, cases)
    assert_same(run, finished)


def test_a_finished_run_is_left_as_it_is(cases: Cases, finished: RunFolder) -> None:
    before = content(finished)
    model = fit(finished, cases)
    assert content(finished) == before
    stored = load_file(finished.weights_file("last"))
    assert plain(dict(model.state_dict())) == plain(stored)


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [1, 2, 3, 3, 4, 5, 6, 6]), (1.0, [3, 6]), (0.25, [2, 3, 5, 6])])
def test_states_are_saved_by_time_and_epoch(
    minutes: float, steps: list[int], new_run: MakeRun, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock advances ten seconds per step."""
    now, saved = 0.0, []

    def step_and_advance(*arguments: Any) -> float:
        nonlocal now
        now += 10.0
        return step(*arguments)

    def note_and_save(run: RunFolder, state: dict[str, Any]) -> None:
        saved.append(state["schedule"]["last_epoch"])
        save(run, state)

    step, save = loop._step, RunFolder.save_state
    monkeypatch.setattr(loop, "_step", step_and_advance)
    monkeypatch.setattr(RunFolder, "save_state", note_and_save)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    run = new_run(checkpoint_minutes=minutes)
    fit(run, cases)
    assert saved == steps
    assert [record["seconds"] for record in run.read_metrics()] == [30.0, 60.0]


def test_time_goes_on_where_it_stopped(new_run: MakeRun, cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    run = new_run()
    with pytest.raises(Stopped):
        fit(run, cases, stop=stop_after(4))
    stopped = torch.load(run.resume_file, weights_only=True)["seconds"]
    clock = itertools.count(10**6)
    fit(run, cases)
    first, second = (record["seconds"] for record in run.read_metrics())
    assert 0 < first < stopped < second < 100


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(new_run: MakeRun, cases: Cases, finished: RunFolder) -> None:
    run = new_run()
    with pytest.raises(Stopped):
        fit(run, cases, stop=stop_after(2))
    before = content(run)
    with largest_file(20_000), pytest.raises(RunError, match=r"resume\.pt: cannot be written \(File too large\)"):
        fit(run, cases)
    assert content(run) == before
    fit(run, cases)
    assert_same(run, finished)


@pytest.mark.parametrize("name", ["best", "last", "metrics"])
def test_a_disk_that_is_full_after_the_state_loses_nothing(
    name: str, new_run: MakeRun, cases: Cases, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_full_disk(write: Callable[..., int]) -> Callable[..., int]:
        def fail(file: Path, *arguments: Any, **options: Any) -> int:
            if name in file.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, *arguments, **options)

        return fail

    run = new_run()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", on_full_disk(Path.write_bytes))
        patch.setattr(Path, "write_text", on_full_disk(Path.write_text))
        with pytest.raises(RunError, match=rf"{name}\.\w+: cannot be written \(No space left on device\)"):
            fit(run, cases)
    assert not list(run.path.rglob(".*"))
    fit(run, cases)
    assert_same(run, finished)


def test_a_folder_that_cannot_be_written_is_named(new_run: MakeRun, cases: Cases) -> None:
    run = new_run()
    run.resume_file.parent.write_text("a file where a folder is needed")
    with pytest.raises(RunError, match=r"checkpoints: cannot be written"):
        fit(run, cases, stop=stop_after(1))


def test_what_a_killed_writer_left_is_removed(cases: Cases, finished: RunFolder) -> None:
    for left in (finished.path / ".unfinished-a.jsonl", finished.resume_file.parent / ".unfinished-a.pt"):
        left.write_bytes(b"half")
    fit(finished, cases)
    assert set(content(finished)) == FILES


@pytest.fixture
def begun(new_run: MakeRun, finished: RunFolder) -> RunFolder:
    """A copy of `finished` to be damaged."""
    run = new_run()
    shutil.copytree(finished.path, run.path, dirs_exist_ok=True)
    return run


def test_a_damaged_state_is_refused(begun: RunFolder, cases: Cases) -> None:
    whole = begun.resume_file.read_bytes()
    begun.resume_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"resume\.pt: damaged"):
        fit(begun, cases)


def test_a_state_that_is_gone_is_missed(begun: RunFolder, cases: Cases) -> None:
    """A training does not begin anew over the weights of finished epochs."""
    begun.resume_file.unlink()
    with pytest.raises(InputError, match=r"resume\.pt: gone"):
        fit(begun, cases)


def test_the_state_of_another_network_is_refused(begun: RunFolder, cases: Cases) -> None:
    config = begun.config
    begun.write_config(config.model_copy(update={"model": config.model.model_copy(update={"expansion": 3})}))
    with pytest.raises(InputError, match="another network"):
        fit(begun, cases)


def test_the_state_of_another_version_is_refused(begun: RunFolder, cases: Cases) -> None:
    state = torch.load(begun.resume_file, weights_only=True)
    for missing in state:
        begun.save_state({key: value for key, value in state.items() if key != missing})
        with pytest.raises(InputError, match="version"):
            fit(begun, cases)


@pytest.mark.parametrize("steps_per_epoch", [2, 4])
def test_epochs_of_another_length_are_refused(begun: RunFolder, cases: Cases, steps_per_epoch: int) -> None:
    changed = begun.config.training.model_copy(update={"steps_per_epoch": steps_per_epoch})
    begun.write_config(begun.config.model_copy(update={"training": changed}))
    with pytest.raises(InputError, match=r"config\.yaml: steps_per_epoch"):
        fit(begun, cases)
