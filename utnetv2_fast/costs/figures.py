"""Figures of cost: networks by parameters, score and operations; operators over growing maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from utnetv2_fast.costs.networks import NetworkCost
from utnetv2_fast.costs.operators import Growth
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

_LEFT, _RIGHT = 0.72, 0.18  # inches beside the axes
_LARGEST_BUBBLE = 0.42  # inches across


def draw_networks(costs: Sequence[NetworkCost], scores: Mapping[str, float]) -> Figure:
    """Dice over parameters, the area of a bubble its operations (paper, Fig. 2 B and C); networks without a score not.

    Raises ValueError when none of the networks has a score.
    """
    shown = [(cost, scores[cost.network]) for cost in costs if cost.network in scores and cost.parameters is not None]
    if not shown:
        raise ValueError("none of these networks has a score")
    figure = new_figure(3.4)
    axes = add_axes(figure, _LEFT, 0.72, WIDTH - _LEFT - _RIGHT, 2.55)
    most = max(cost.flops or 0 for cost, _ in shown)
    for index, (cost, dice) in enumerate(shown):
        flops = cost.flops or 0
        across = 72 * _LARGEST_BUBBLE * math.sqrt(flops / most)
        millions = (cost.parameters or 0) / 1e6
        axes.plot(millions, dice, "o", color=class_colour(index), ms=across, alpha=0.6, mec="white", mew=0.8)
        axes.annotate(
            f"{plain(cost.title)}, {flops / 1e9:.3g} G",
            (millions, dice),
            xytext=(0, across / 2 + 2),
            textcoords="offset points",
            ha="center",
            fontsize=FONT_SIZE - 1,
            color=INK,
        )
    axes.margins(0.22, 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    label_axes(axes, "parameters (millions)", "Dice")
    figure.text(0.5, 0.08 / 3.4, "area: operations of a forward pass (FLOP)", ha="center", fontsize=8, color=MUTED)
    return figure


def draw_operators(growths: Sequence[Growth]) -> Figure:
    """Time and memory of a step as measured, operations by the paper's formulas, over n on logarithmic axes."""
    styles: list[dict[str, Any]] = [
        {"color": class_colour(index), "marker": "osD^v"[index % 5], "ms": 3.5, "lw": 1.3}
        for index in range(len(growths))
    ]
    handles = [Line2D([], [], **style, label=growth.title) for style, growth in zip(styles, growths, strict=True)]
    panel, between = 1.6, 0.32
    bottom = 0.45 + legend_height(handles)
    figure = new_figure(bottom + 3 * panel + 2 * between + 0.15)
    positions = sorted({n for growth in growths for n in growth.positions})
    names = ("time of a step (ms)", "its memory (MiB)", "paper: operations (G)")
    for row, name in enumerate(names):
        lower = bottom + (2 - row) * (panel + between)
        axes = add_axes(figure, _LEFT, lower, WIDTH - _LEFT - _RIGHT, panel)
        for style, growth in zip(styles, growths, strict=True):
            values = (
                [1e3 * took for took in growth.seconds],
                [math.nan if size is None else max(size, 1) / 2**20 for size in growth.bytes],
                [operations / 1e9 for operations in growth.operations],
            )[row]
            axes.plot(growth.positions, values, **style)
        if row == 1 and not any(size is not None for growth in growths for size in growth.bytes):
            axes.text(0.5, 0.5, "not known on this system", transform=axes.transAxes, ha="center", color=MUTED)
            axes.set(xscale="log")
        else:
            axes.set(xscale="log", yscale="log")
        axes.set_xlim(positions[0] / 1.15, positions[-1] * 1.15)
        ticks = [n for n in positions if math.isqrt(n) & (math.isqrt(n) - 1) == 0] or positions
        axes.set_xticks(ticks, [f"{math.isqrt(n)}²" for n in ticks] if row == 2 else [""] * len(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        label_axes(axes, "positions n" if row == 2 else "", name)
    legend_below(figure, handles)
    return figure
