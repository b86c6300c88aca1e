"""Training learns, shows how far it is, keeps the weights that it should, and stops where it must."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from utnetv2_fast.data.augment import AugmentationProfile, Effect
from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.errors import RunError
from utnetv2_fast.training import RunFolder, loop, train
from utnetv2_fast.training.loop import Progress

CPU = torch.device("cpu")
MakeRun = Callable[..., RunFolder]
Cases = list[PreparedCase]


def fit(run: RunFolder, cases: Cases, **options: object) -> torch.nn.Module:
    return train(run, cases[:2], cases[2:], CPU, **options)  # type: ignore[arg-type]


def test_learns_to_find_the_square(make_run: MakeRun, cases: Cases) -> None:
    run = make_run(epochs=6, steps_per_epoch=20)
    model = fit(run, cases)
    metrics = list(run.read_metrics())
    assert [record["epoch"] for record in metrics] == list(range(6))
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[-1]["dice"] > 0.9
    assert not model.training
    returned, stored = model.state_dict(), load_file(run.weights_file("last"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in returned.items())


def test_compiled_training_gives_the_same_weights_under_the_same_names(
    make_run: MakeRun, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, options = torch.compile, []

    def compile_quickly(model: torch.nn.Module, **given: object) -> Callable[..., object]:
        options.append(given)
        return compile_(model, backend="eager", **given)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    runs = [make_run(name, epochs=2, compile=name == "compiled") for name in ("plain", "compiled")]
    for run in runs:
        fit(run, cases)
    assert options == [{"dynamic": False}]
    states = [torch.load(run.resume_file, weights_only=True) for run in runs]
    for expected, actual in (
        [state["model"] for state in states],
        [load_file(run.weights_file("last")) for run in runs],
    ):
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize(("model_impl", "checks"), [("auto", [(CPU, torch.bfloat16)]), ("reference", [])])
def test_kernels_are_checked_in_the_dtype_of_the_run(
    model_impl: str,
    checks: list[tuple[torch.device, torch.dtype]],
    make_run: MakeRun,
    cases: Cases,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = []
    monkeypatch.setattr(loop, "check_kernels", lambda *arguments: checked.append(arguments))
    run = make_run(epochs=1, steps_per_epoch=1, precision="bfloat16")
    config = run.config
    run.write_config(config.model_copy(update={"model": config.model.model_copy(update={"impl": model_impl})}))
    fit(run, cases)
    assert checked == checks


def test_progress_counts_every_step_once(make_run: MakeRun, cases: Cases) -> None:
    seen: list[Progress] = []
    fit(make_run(), cases, watch=seen.append)
    assert [progress.step for progress in seen] == list(range(1, 13))
    assert seen[-1].seconds_left == 0
    assert seen[0].dice is None
    assert seen[-1].dice is not None


def test_the_network_is_shown_after_every_epoch_once_the_epoch_is_on_disk(make_run: MakeRun, cases: Cases) -> None:
    run = make_run()
    seen = []

    def look(network: torch.nn.Module) -> None:
        stored = load_file(run.weights_file("last"))
        assert all(torch.equal(stored[name], tensor) for name, tensor in network.state_dict().items())
        assert not network.training
        state = torch.load(run.resume_file, weights_only=True)
        seen.append((len(run.read_metrics()), len(state["records"])))

    fit(run, cases, after_epoch=look)
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_loss_that_is_not_finite_names_the_cases(make_run: MakeRun, cases: Cases, tmp_path: Path) -> None:
    image = np.array(cases[1].image())
    image[:] = np.inf
    np.save(tmp_path / "broken.npy", image)
    broken = replace(cases[1], name="broken_scan", image_file=tmp_path / "broken.npy")
    with pytest.raises(RunError, match=r"not finite.*broken_scan"):
        train(make_run(augmentation="none"), [broken], cases[2:], CPU)


def test_best_weights_are_those_of_the_best_epoch(
    make_run: MakeRun, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, last = iter([0.5, 0.7, 0.6]), []

    def scripted(*_: object) -> Callable[[torch.nn.Module], tuple[float, list[float | None]]]:
        def validate(model: torch.nn.Module) -> tuple[float, list[float | None]]:
            last.append(copy.deepcopy(model.module.state_dict()))
            return next(dice), []

        return validate

    monkeypatch.setattr(loop, "_validation", scripted)
    run = make_run()
    fit(run, cases)
    best = load_file(run.weights_file("best"))
    assert all(torch.equal(best[name], tensor) for name, tensor in last[1].items())
    assert not all(torch.equal(best[name], tensor) for name, tensor in last[2].items())


def test_averaged_weights_keep_up_with_the_latest(make_run: MakeRun, cases: Cases) -> None:
    """Their batch norms have statistics of their own: those of the latest weights can ruin an average of many."""
    run = make_run(epochs=1, steps_per_epoch=30, warmup_epochs=0.0)
    averaged = fit(run, cases)
    state = torch.load(run.resume_file, weights_only=True)
    for name, latest in state["model"].items():
        if name.endswith("running_var"):
            assert not torch.equal(averaged.state_dict()[name], latest), name
    [record] = run.read_metrics()
    assert record["dice"] > 0.5


def test_batch_norms_of_averaged_weights_may_have_the_latest_statistics(make_run: MakeRun, cases: Cases) -> None:
    """As in the authors' code, which averages weights and copies buffers."""
    run = make_run(epochs=1, norm_statistics="latest", clip_norm=None, dice="adaptive", schedule="epochwise")
    averaged = fit(run, cases)
    state = torch.load(run.resume_file, weights_only=True)
    statistics = [name for name in state["model"] if name.endswith("running_var")]
    assert statistics
    assert all(torch.equal(averaged.state_dict()[name], state["model"][name]) for name in statistics)


def test_a_profile_of_ones_own_augments(make_run: MakeRun, cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    augment = loop.augment
    monkeypatch.setattr(loop, "augment", lambda *given: seen.append(given[4]) or augment(*given))
    profile = AugmentationProfile(shift=Effect(probability=1, low=3, high=3))
    run = make_run(epochs=1, augmentation=profile)
    assert run.config.training.augmentation == profile
    fit(run, cases)
    assert set(seen) == {profile}
