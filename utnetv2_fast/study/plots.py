"""Figures of a study: Dice against the amount of data (paper Fig. 2A) and by domain (Fig. 2D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from utnetv2_fast.evaluation.figures import (
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
from utnetv2_fast.study.results import (
    REFERENCE,
    Domain,
    Result,
    Spread,
    by_share,
    networks_of,
    of_network,
    over_trials,
    title_of,
    within,
)

_LEFT, _RIGHT, _PANEL = 0.62, 0.15, 2.4  # inches
_MARKERS = "sD^vPX*<>hd"
_DICE = "Dice (%)"


def draw_curve(results: Sequence[Result]) -> Figure:
    """Mean Dice of every network at each share of the patients, a stroke for the deviation over trials."""
    networks, shares = networks_of(results), by_share(results)
    handles = _handles(networks)
    bottom = 0.45 + legend_height(handles)
    figure = new_figure(bottom + _PANEL + 0.15)
    axes = add_axes(figure, _LEFT, bottom, WIDTH - _LEFT - _RIGHT, _PANEL)
    for network, handle in zip(networks, handles, strict=True):
        spreads = {share: over_trials(of_network(own, network), "dice") for share, own in shares.items()}
        known = {share: value for share, value in spreads.items() if not math.isnan(value.mean)}
        x, y = [100 * share for share in known], [100 * value.mean for value in known.values()]
        axes.plot(x, y, color=handle.get_color(), marker=handle.get_marker(), ms=5, lw=handle.get_linewidth())
        for place, value in zip(x, known.values(), strict=True):
            _draw_deviation(axes, place, value, handle)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([100 * share for share in shares]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{100 * share:g}" for share in shares])
    label_axes(axes, "patients trained on (%)", _DICE)
    legend_below(figure, handles)
    return figure


def draw_domains(results: Sequence[Result], domains: Sequence[Domain]) -> Figure:
    """Mean Dice of every network in each domain, those that were trained on first; of several shares the largest."""
    networks = networks_of(results)
    largest = list(by_share(results).values())[-1]
    handles = _handles(networks)
    bottom = 0.75 + legend_height(handles)
    figure = new_figure(bottom + _PANEL + 0.15)
    axes = add_axes(figure, _LEFT, bottom, WIDTH - _LEFT - _RIGHT, _PANEL)
    offsets = np.linspace(-0.3, 0.3, len(networks)) if len(networks) > 1 else np.zeros(1)
    for network, handle, offset in zip(networks, handles, offsets.tolist(), strict=True):
        for place, domain in enumerate(domains):
            value = over_trials(within(of_network(largest, network), domain), "dice")
            if not math.isnan(value.mean):
                x = place + offset
                axes.plot([x], [100 * value.mean], color=handle.get_color(), marker=handle.get_marker(), ms=6)
                _draw_deviation(axes, x, value, handle)
    seen = sum(domain.seen for domain in domains)
    if 0 < seen < len(domains):
        axes.axvline(seen - 0.5, color=MUTED, lw=0.8, ls=(0, (3, 2)))
    names = [f"{plain(domain.name, 14)}\n{'seen' if domain.seen else 'unseen'}" for domain in domains]
    axes.set_xticks(range(len(domains)), names)
    axes.set_xlim(-0.5, len(domains) - 0.5)
    axes.tick_params(axis="x", length=0)
    label_axes(axes, "domain", _DICE)
    legend_below(figure, handles)
    return figure


def _handles(networks: Sequence[str]) -> list[Line2D]:
    """UTNetV2 in ink, the others in colours and shapes of their own."""
    handles = []
    others = 0
    for network in networks:
        style: dict[str, Any]
        if network == REFERENCE:
            style = {"color": INK, "marker": "o", "lw": 2.2}
        else:
            style = {"color": class_colour(others), "marker": _MARKERS[others % len(_MARKERS)], "lw": 1.3}
            others += 1
        handles.append(Line2D([], [], label=plain(title_of(network)), ms=5, **style))
    return handles


def _draw_deviation(axes: Axes, x: float, value: Spread, handle: Line2D) -> None:
    if not math.isnan(value.std):
        low, high = 100 * (value.mean - value.std), 100 * (value.mean + value.std)
        axes.plot([x, x], [low, high], color=handle.get_color(), lw=1, alpha=0.6)
