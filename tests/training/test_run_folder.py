"""A run folder gives back what was put in, and says in a sentence what is wrong with one that is damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utnetv2_fast import locks
from utnetv2_fast.errors import InputError
from utnetv2_fast.models import UTNetV2
from utnetv2_fast.training import RunFolder
from utnetv2_fast.training.run_folder import find_runs, only_training_in

MakeRun = Callable[..., RunFolder]


def test_weights_come_back_exactly(make_run: MakeRun) -> None:
    run = make_run()
    model = UTNetV2(run.config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run.save_weights("last", model.state_dict())
    loaded = run.load_model()
    assert not loaded.training
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        _ = RunFolder(tmp_path / "nowhere").config
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a run folder"):
        _ = RunFolder(tmp_path / "file").config


@pytest.mark.parametrize("text", ["", "{", "protocol: clean\n", "\x00", "- 1\n"])
def test_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml: damaged"):
        _ = RunFolder(tmp_path).config


def test_unknown_setting_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    run.config_file.write_text(run.config_file.read_text() + "colour: blue\n")
    with pytest.raises(InputError, match="Extra inputs"):
        _ = run.config


def test_missing_damaged_and_foreign_weights_are_refused(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(InputError, match="no such weights"):
        run.load_model()
    run.save_weights("last", {"head.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="another network"):
        run.load_model()
    run.weights_file("last").write_bytes(b"\x10")
    with pytest.raises(InputError, match="damaged weights"):
        run.load_model()


STATE = {"model": {"weight": torch.linspace(-1, 1, 300)}, "records": [{"dice": 0.5}, {"dice": None}], "step": 7}


def test_the_state_comes_back_exactly(make_run: MakeRun) -> None:
    run = make_run()
    assert run.load_state() is None
    run.save_state(STATE)
    assert repr(run.load_state()) == repr(STATE)
    assert torch.equal(run.load_state()["model"]["weight"], STATE["model"]["weight"])


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_state_is_refused(make_run: MakeRun, seed: int) -> None:
    """Cut short, or with other bytes: whatever is loaded is what was saved. torch alone loads changed weights."""
    run, rng = make_run(), random.Random(seed)
    run.save_state(STATE)
    whole = run.resume_file.read_bytes()
    refused = 0
    for cut in [True, False] * 50:
        place = rng.randrange(len(whole) - 16)
        run.resume_file.write_bytes(whole[:place] + (b"" if cut else rng.randbytes(16) + whole[place + 16 :]))
        try:
            state = run.load_state()
        except InputError:
            refused += 1
        else:
            assert state is not None
            assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert refused > 80


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_state_is_refused(make_run: MakeRun, content: bytes) -> None:
    run = make_run()
    run.save_state(STATE)
    run.resume_file.write_bytes(content)
    with pytest.raises(InputError, match=r"resume\.pt: damaged"):
        run.load_state()
    torch.save(torch.zeros(3), run.resume_file)
    with pytest.raises(InputError, match=r"resume\.pt: damaged"):
        run.load_state()


def test_metrics_come_back_exactly(make_run: MakeRun) -> None:
    run = make_run()
    assert run.read_metrics() == []
    records = [{"epoch": epoch, "dice": epoch / 3, "dice_per_class": [None, 0.1]} for epoch in range(3)]
    run.write_metrics(records)
    assert run.read_metrics() == records
    run.write_metrics(records[:2])
    assert run.read_metrics() == records[:2]


@pytest.mark.parametrize("content", [b'{"epoch": 0}\n{"epoch": 1, "lo', b"\xff\n"])
def test_damaged_metrics_are_refused(make_run: MakeRun, content: bytes) -> None:
    run = make_run()
    run.metrics_file.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl: damaged"):
        run.read_metrics()


@pytest.mark.parametrize("content", [b"[", b"\xff"])
def test_a_damaged_environment_is_refused(make_run: MakeRun, content: bytes) -> None:
    run = make_run()
    run.environment_file.write_bytes(content)
    with pytest.raises(InputError, match=r"environment\.json: damaged"):
        run.append_environment({})
    assert run.environment_file.read_bytes() == content


def test_resources_keep_the_largest_peak_and_the_latest_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_resources() == {}
    run.record_resources(peak_memory_bytes=5, prediction_seconds=3.0, peak_gpu_memory_bytes=None)
    run.record_resources(peak_memory_bytes=4, prediction_seconds=2.0)
    assert run.read_resources() == {"peak_memory_bytes": 5, "prediction_seconds": 2.0}


def test_two_trainings_never_write_to_one_folder(tmp_path: Path) -> None:
    with only_training_in(tmp_path / "run"):
        with (
            pytest.raises(InputError, match=r"run: another training \(process \d+ on .+\)"),
            only_training_in(tmp_path / "run"),
        ):
            pass
        with only_training_in(tmp_path / "other"):
            pass
    with only_training_in(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_without_locks_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    entered = False
    with pytest.warns(RuntimeWarning, match="no other training"), only_training_in(tmp_path):
        entered = True
    assert entered


def test_runs_are_found_in_their_folder_and_in_that_of_all_folds(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("all/fold-1", "all/fold-0", "single"):
        make_run(name)
    assert [run.path for run in find_runs(tmp_path / "all")] == [tmp_path / "all" / f"fold-{k}" for k in range(2)]
    assert [run.path for run in find_runs(tmp_path / "single")] == [tmp_path / "single"]
    assert find_runs(tmp_path) == find_runs(tmp_path / "nowhere") == []
