"""Progress and JSON: complete, in order, and never on the stream that holds the results."""

from __future__ import annotations

import io
import itertools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from utnetv2_fast.cli import console as module
from utnetv2_fast.cli.console import print_json, stop_signals, stopping, track
from utnetv2_fast.errors import Stopped


@pytest.mark.parametrize("terminal", [True, False])
def test_track_yields_every_item_and_leaves_stdout_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "messages", Console(file=screen, force_terminal=terminal, width=100))
    # A loop within a loop, as prepare within train.
    pairs = [(a, b) for a in track([1, 2], "outer") for b in track("xy", "inner")]
    assert pairs == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert list(track([], "nothing")) == []
    assert capsys.readouterr().out == ""
    assert ("outer" in screen.getvalue()) == terminal


def test_without_a_terminal_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "messages", Console(file=io.StringIO(), force_terminal=False))
    clock = itertools.count(step=4.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    assert list(track(range(6), "work")) == list(range(6))
    assert capsys.readouterr().err.splitlines() == ["work: 2/6, 24 s left", "work: 5/6, 5 s left", "work: 6/6, 28 s"]


def test_short_work_without_a_terminal_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "messages", Console(file=io.StringIO(), force_terminal=False))
    assert list(track([1, 2, 3], "work")) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_a_loop_left_early_takes_its_bar_away(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "messages", Console(file=screen, force_terminal=True))
    loop = iter(track([1, 2], "work"))
    next(loop)
    del loop
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor, which a bar hides, is back


def test_print_json_takes_what_results_hold(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {
            "path": Path("a/b"),
            "numpy": [np.float32(0.5), np.int64(3)],
            "torch": torch.tensor(2.0),
            "missing": (float("nan"), float("inf"), np.float64("nan")),
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "path": "a/b",
        "numpy": [0.5, 3],
        "torch": 2.0,
        "missing": [None, None, None],
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_next_has_its_own_effect_again(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop()
        assert signal.getsignal(number) is not before
        signal.raise_signal(number)
        assert stop()
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop()
            signal.raise_signal(signal.SIGTERM)
            assert stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_work_is_stopped_between_two_items() -> None:
    done: list[str] = []
    items = map(done.append, stopping(track, lambda: len(done) == 2)("abc", "Work"))
    with pytest.raises(Stopped, match=r"^Work: stopped after 2 of 3. Go on with the same command.$"):
        list(items)
    assert done == ["a", "b"]
    assert list(stopping(track, lambda: False)("abc", "Work")) == ["a", "b", "c"]
