"""Curves of trainings of any length and with gaps, and points of scores that are missing or far away."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from utnetv2_fast.evaluation.figures import png
from utnetv2_fast.evaluation.metrics import Evaluation, Score
from utnetv2_fast.evaluation.plots import draw_convergence, draw_curves, draw_scores


def records(epochs: int) -> list[dict[str, Any]]:
    return [
        {"epoch": e, "loss": 1 / (e + 1), "dice": 0.5 + e / 100, "dice_per_class": [0.4, None if e == 1 else 0.6]}
        for e in range(epochs)
    ]


@pytest.mark.parametrize("epochs", [1, 2, 7, 300])
def test_curves_show_every_epoch_and_how_many_there_will_be(epochs: int) -> None:
    figure = draw_curves(records(epochs), ("a", "b"), 300)
    loss, dice = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), np.arange(1, epochs + 1))
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [r["loss"] for r in records(epochs)])
    assert math.isnan(dice.lines[1].get_ydata()[1]) if epochs > 1 else True
    low, high = dice.get_xlim()
    assert low < 1
    assert high > 300
    assert dice.lines[-1].get_xdata() == [epochs]  # the best mean is the last one
    assert (loss.get_ylabel(), dice.get_xlabel()) == ("training loss", "epoch")
    assert png(figure).startswith(b"\x89PNG")


def test_curves_bear_what_is_missing() -> None:
    for partial in ({"epoch": 0}, {"epoch": 3, "loss": None, "dice": None, "dice_per_class": [None]}):
        assert png(draw_curves([partial], ("a", "b"), 1)).startswith(b"\x89PNG")


def test_every_case_is_a_point() -> None:
    scores = [Score(f"case{i}", "a", 0.8 + i / 100, 2.0 + i, 1.0, 9, 9) for i in range(12)]
    scores += [Score("case0", "nowhere", math.nan, math.nan, math.nan, 0, 0)]
    figure = draw_scores(Evaluation(("a", "nowhere"), 1.0, tuple(scores)))
    dice, hd95 = figure.axes
    assert sorted(dice.lines[0].get_xdata()) == [s.dice for s in scores[:-1]]
    assert dice.lines[1].get_xdata() == [pytest.approx(np.mean([s.dice for s in scores[:-1]]))]
    assert [text.get_text() for text in dice.texts] == ["in no case"]
    assert hd95.get_xscale() == "linear"
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("hd95", [0.0, 300.0])
def test_every_point_is_inside_the_axes(hd95: float) -> None:
    scores = [Score(f"case{i}", "a", dice, mm, 1.0, 9, 9) for i, (dice, mm) in enumerate([(0.0, hd95), (1.0, 1.0)] * 4)]
    figure = draw_scores(Evaluation(("a",), 1.0, (*scores, Score("last", "a", 0.99, 1.5, 1.0, 9, 9))))
    for axes, values in zip(figure.axes, ((0.0, 1.0), (hd95, 1.0)), strict=True):
        low, high = axes.get_xlim()
        assert low < min(values)
        assert high > max(values)


def test_no_score_at_all_is_a_figure_that_says_so() -> None:
    figure = draw_scores(Evaluation(("a",), 1.0, (Score("case", "a", math.nan, math.nan, math.nan, 0, 0),)))
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["in no case"] * 2
    assert png(figure).startswith(b"\x89PNG")


def test_convergence_has_a_line_per_run_over_its_steps() -> None:
    runs = {
        "UTNetV2": [{"step": 50, "loss": 1.0, "dice": 0.5}, {"step": 100, "loss": 0.5, "dice": None}],
        "ResUNet": [{"step": 80, "loss": 2.0}],
    }
    figure = draw_convergence(runs)
    loss, dice = figure.axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[50, 100], [80]]
    assert [list(line.get_ydata()) for line in loss.lines] == [[1.0, 0.5], [2.0]]
    assert math.isnan(dice.lines[0].get_ydata()[1])
    assert math.isnan(dice.lines[1].get_ydata()[0])
    assert loss.get_xlim() == dice.get_xlim()
    assert [text.get_text() for text in figure.legends[0].texts] == ["UTNetV2", "ResUNet"]
    assert png(figure).startswith(b"\x89PNG")
