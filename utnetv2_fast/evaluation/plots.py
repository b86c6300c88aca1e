"""Figures of numbers: how a training went, and how the scores spread over the cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from utnetv2_fast.evaluation.figures import (
    FONT_SIZE,
    INK,
    MUTED,
    WIDTH,
    add_axes,
    class_colour,
    label_axes,
    legend_below,
    legend_height,
    new_figure,
    plain,
)
from utnetv2_fast.evaluation.metrics import Evaluation

_LEFT, _RIGHT = 0.62, 0.15  # inches beside the axes
_BEST: dict[str, Any] = {"color": INK, "marker": "o", "ms": 8, "mfc": "none", "mew": 1.2, "ls": ""}
_REMARK: dict[str, Any] = {"color": MUTED, "fontsize": FONT_SIZE, "ha": "center", "va": "center"}
_OUTLYING = 8  # times the median, beyond which one HD95 would press all others against the axis
_MOST_MARKED = 40  # epochs, beyond which points hide the line they lie on


def draw_curves(records: Sequence[Mapping[str, Any]], labels: Sequence[str], epochs: int) -> Figure:
    """Loss above Dice over the epochs, of at least one record of `metrics.jsonl`.

    `labels` names the foreground classes; a class without a Dice in some epoch has a gap there. The axis reaches to
    `epochs`, so that a training that still runs, or was stopped, shows how far it came.
    """
    # The first seven colours are easy to tell apart; dashes keep the others from being taken for them.
    styles: list[dict[str, Any]] = [
        {"color": class_colour(index), "ls": "-" if index < 7 else (0, (4, 1.5))} for index in range(len(labels))
    ]
    handles = [
        *(Line2D([], [], **style, lw=1.5, label=plain(label)) for style, label in zip(styles, labels, strict=True)),
        Line2D([], [], color=INK, lw=2, label="mean"),
        Line2D([], [], **_BEST, label="best mean"),
    ]
    bottom = 0.45 + legend_height(handles)
    panel, between = 1.75, 0.3
    figure = new_figure(bottom + 2 * panel + between + 0.15)
    width = WIDTH - _LEFT - _RIGHT
    loss = add_axes(figure, _LEFT, bottom + panel + between, width, panel)
    dice = add_axes(figure, _LEFT, bottom, width, panel)
    x = [record["epoch"] + 1 for record in records]
    marker = "o" if len(x) <= _MOST_MARKED else ""

    loss.plot(x, [_number(record.get("loss")) for record in records], color=INK, marker=marker, ms=3, lw=1.5)
    loss.tick_params(labelbottom=False)
    label_axes(loss, "", "training loss")

    per_class = [record.get("dice_per_class") or [] for record in records]
    for index, style in enumerate(styles):
        y = [_number(values[index]) if index < len(values) else math.nan for values in per_class]
        dice.plot(x, y, **style, marker=marker, ms=3, lw=1.3)
    mean = [_number(record.get("dice")) for record in records]
    dice.plot(x, mean, color=INK, marker=marker, ms=3, lw=2)
    if not all(map(math.isnan, mean)):
        best = int(np.nanargmax(mean))
        dice.plot(x[best], mean[best], **_BEST)
    dice.set_ylim(0, 1.03)
    label_axes(dice, "epoch", "Dice, validation patches")
    last = max(epochs, x[-1])
    margin = 0.03 * (last - 1) or 0.5
    for axes in (loss, dice):
        axes.set_xlim(1 - margin, last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_below(figure, handles)
    return figure


def draw_convergence(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss above Dice over the steps of several trainings (paper, Fig. 4 B): {name: records of `metrics.jsonl`}."""
    styles: list[dict[str, Any]] = [
        {"color": class_colour(index), "ls": "-" if index < 7 else (0, (4, 1.5)), "lw": 1.5}
        for index in range(len(runs))
    ]
    handles = [Line2D([], [], **style, label=plain(name)) for style, name in zip(styles, runs, strict=True)]
    bottom = 0.45 + legend_height(handles)
    panel, between = 1.75, 0.3
    figure = new_figure(bottom + 2 * panel + between + 0.15)
    width = WIDTH - _LEFT - _RIGHT
    loss = add_axes(figure, _LEFT, bottom + panel + between, width, panel)
    dice = add_axes(figure, _LEFT, bottom, width, panel)
    for style, records in zip(styles, runs.values(), strict=True):
        steps = [record["step"] for record in records]
        marker = "o" if len(steps) <= _MOST_MARKED else ""
        for axes, name in ((loss, "loss"), (dice, "dice")):
            axes.plot(steps, [_number(record.get(name)) for record in records], **style, marker=marker, ms=3)
    loss.tick_params(labelbottom=False)
    label_axes(loss, "", "training loss")
    dice.set_ylim(0, 1.03)
    label_axes(dice, "step", "Dice, validation patches")
    dice.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    loss.sharex(dice)
    legend_below(figure, handles)
    return figure


def draw_scores(evaluation: Evaluation) -> Figure:
    """Dice and HD95 of every case: a row of points per class, with a stroke at their mean."""
    row, between, bottom, top = 0.4, 0.6, 0.5, 0.1
    height = max(1, len(evaluation.labels)) * row
    figure = new_figure(bottom + 2 * height + between + top)
    left = 0.2 + 0.075 * max(len(plain(label)) for label in evaluation.labels)
    width = WIDTH - left - _RIGHT
    dice = add_axes(figure, left, bottom + height + between, width, height)
    hd95 = add_axes(figure, left, bottom, width, height)
    values = _draw_points(dice, evaluation, "dice")
    dice.set_xlim(min(0.9, math.floor(10 * values.min(initial=1)) / 10) - 0.012, 1.012)
    label_axes(dice, "Dice (points: cases, stroke: mean)")
    values = _draw_points(hd95, evaluation, "hd95")
    largest = max(1.0, values.max(initial=0))
    if len(values) and largest > _OUTLYING * max(1.0, float(np.median(values))):
        hd95.set_xscale("symlog", linthresh=1)
        hd95.xaxis.set_major_formatter(ScalarFormatter())
        hd95.set_xlim(-0.1, 1.3 * largest)
        label_axes(hd95, "HD95 (mm, logarithmic beyond 1 mm)")
    else:
        hd95.set_xlim(-0.02 * largest, 1.05 * largest)
        label_axes(hd95, "HD95 (mm)")
    return figure


def _draw_points(axes: Axes, evaluation: Evaluation, metric: str) -> NDArray[np.float64]:
    """Draw the classes' scores by `metric` and return those of all of them."""
    drawn = []
    for index, label in enumerate(evaluation.labels):
        values = np.array([getattr(score, metric) for score in evaluation.scores if score.label == label], dtype=float)
        values = np.sort(values[~np.isnan(values)])
        drawn.append(values)
        if not len(values):
            axes.text(0.5, index, "in no case", transform=axes.get_yaxis_transform(), **_REMARK)
            continue
        # Neighbours in the order of their values lie at different heights, and so beside each other.
        heights = index + np.resize((0, 0.2, -0.1, 0.1, -0.2), len(values))
        axes.plot(values, heights, "o", color=class_colour(index), ms=4.5, alpha=0.6, mew=0)
        axes.plot(values.mean(), index, "|", color=INK, ms=17, mew=1.8)
    axes.set_yticks(range(len(evaluation.labels)), [plain(label) for label in evaluation.labels])
    axes.set_ylim(len(evaluation.labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    return np.concatenate(drawn) if drawn else np.empty(0)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
