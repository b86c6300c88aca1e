"""Figures of attention (paper, Fig. 4 D, E): each semantic token's weights over the scan, how alike the tokens are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from utnetv2_fast.evaluation.figures import (
    FONT_SIZE,
    INK,
    MUTED,
    WIDTH,
    add_axes,
    legend_below,
    legend_height,
    new_figure,
    plain,
)
from utnetv2_fast.evaluation.pictures import (
    PANEL_TITLE,
    Box,
    View,
    class_handles,
    extent_of,
    overlay_classes,
    percentile_window,
    show_scan,
    view_slice,
)
from utnetv2_fast.inspection import InspectedBlock, Inspection

_MOST_COLUMNS = 9  # tokens beside each other, or classes
_MOST_ROWS = 16
_GAP, _ROW_NAME = 0.05, 0.2  # inches between panels, and beside them for the name of their row
_HEADING, _TITLE = 0.22, 0.2  # above all, and above the first row
_SCALE = 0.56  # below the panels, for the scale of the weights
_BRIGHTEST = 99.0  # percentile of a figure's weights from which on they all look alike


def _heat() -> ListedColormap:
    """From violet to yellow; the smaller a weight, the more of the scan is seen through it."""
    colours = colormaps["plasma"](np.linspace(0.15, 1, 256))
    colours[:, 3] = np.linspace(0, 0.8, 256)
    return ListedColormap(colours)


def last_blocks(inspection: Inspection) -> list[InspectedBlock]:
    """The last block of every stage, in the order of the network."""
    return list({block.stage: block for block in inspection.blocks}.values())


def draw_overview(inspection: Inspection) -> Figure:
    """A row per stage, a column per class: of the last block's tokens the one with most of its weight on the class."""
    blocks = last_blocks(inspection)[:_MOST_ROWS]
    values = range(len(inspection.classes))[:_MOST_COLUMNS]
    places = [[_most_on(block, value) for value in values] for block in blocks]
    return _draw(
        inspection,
        "The token most on each class",
        [plain(block.stage, 12) for block in blocks],
        [plain(inspection.classes[value], 10) for value in values],
        [[block.maps[place] for place in row] for block, row in zip(blocks, places, strict=True)],
        [
            [f"{100 * block.shares[place][value]:.0f} %" for value, place in zip(values, row, strict=True)]
            for block, row in zip(blocks, places, strict=True)
        ],
    )


def _most_on(block: InspectedBlock, value: int) -> tuple[int, int]:
    """(head, token)"""
    head, token = np.unravel_index(block.shares[..., value].argmax(), block.shares.shape[:2])
    return int(head), int(token)


def draw_block(inspection: Inspection, block: InspectedBlock) -> Figure:
    """A row per head, a column per semantic token; of many tokens those whose weights are furthest from even."""
    tokens = _telling_tokens(block.weights)
    maps = block.maps[:_MOST_ROWS]
    return _draw(
        inspection,
        f"{plain(block.stage)}, block {block.block}",
        [f"head {head + 1}" for head in range(len(maps))],
        [f"token {token + 1}" for token in tokens],
        [[of_head[token] for token in tokens] for of_head in maps],
    )


def _telling_tokens(weights: NDArray[np.float32]) -> list[int]:
    """Of (H, l, *spatial) at most as many tokens as fit beside each other."""
    flat = weights.reshape(*weights.shape[:2], -1)
    unevenness = np.abs(flat - 1 / flat.shape[-1]).sum(axis=(0, 2))
    return sorted(np.argsort(-unevenness, kind="stable")[:_MOST_COLUMNS].tolist())


def draw_similarity(inspection: Inspection) -> Figure:
    """A column per stage: cosines between the last block's tokens, above those between averages over a grid."""
    blocks = last_blocks(inspection)[:_MOST_COLUMNS]
    side = min(1.6, (WIDTH - _ROW_NAME - (len(blocks) - 1) * _GAP) / len(blocks))
    bottom, row = _SCALE + 0.05, side + _TITLE
    whole = bottom + 2 * row + 0.16 + _HEADING
    figure = new_figure(whole)
    _head_line(figure, "|cosine| between semantic tokens", plain(inspection.case))
    for number, name in enumerate(("average pooling", "B-MHA")):
        lower = bottom + number * row
        figure.text(0.09 / WIDTH, (lower + side / 2) / whole, name, rotation=90, ha="center", va="center", **_small(1))
        for column, block in enumerate(blocks):
            axes = _add_panel(figure, _ROW_NAME + column * (side + _GAP), lower, side, side)
            matrix = (block.down_sampled, block.aggregated)[number]
            axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            mean = block.similarities[1 - number]
            stage = f"{plain(block.stage, 12)}\n" if number else ""
            axes.set_title(stage + ("one token" if math.isnan(mean) else f"mean {mean:.2f}"), **PANEL_TITLE)
    _add_scale(figure, Normalize(0, 1), "viridis", "absolute cosine; the mean is that of different tokens")
    return figure


def _draw(
    inspection: Inspection,
    title: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    maps: Sequence[Sequence[NDArray[np.float32]]],
    notes: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """Weights `maps[row][column]` (h, w) over the scan, `notes` in them, after a column with the prediction."""
    view, box = _view_of(inspection)
    window = percentile_window(view, box)
    legend = class_handles([view], inspection.classes[1:])
    columns = 1 + len(column_names)
    width = (WIDTH - _ROW_NAME - (columns - 1) * _GAP) / columns
    height = width * box.height / box.width
    bottom = _SCALE + legend_height(legend)
    whole = bottom + len(maps) * (height + _GAP) + _TITLE + _HEADING
    figure = new_figure(whole)
    _head_line(figure, title, f"{plain(inspection.case)}, {inspection.position}")
    highest = float(np.percentile(np.concatenate([m.ravel() for row in maps for m in row]), _BRIGHTEST))
    norm, heat = Normalize(0, max(highest, 2.0)), _heat()
    for row, (name, of_row) in enumerate(zip(row_names, maps, strict=True)):
        lower = bottom + (len(maps) - 1 - row) * (height + _GAP)
        figure.text(
            0.09 / WIDTH, (lower + height / 2) / whole, name, rotation=90, ha="center", va="center", **_small(height)
        )
        for column in range(columns):
            axes = _add_panel(figure, _ROW_NAME + column * (width + _GAP), lower, width, height)
            show_scan(axes, view, box, window)
            if not row:
                axes.set_title(("scan", *column_names)[column], **PANEL_TITLE | _small(width))
            if not column:
                overlay_classes(axes, view.prediction, view.spacing)
                continue
            weights = of_row[column - 1][::-1, ::-1]  # turned as the view is
            axes.imshow(weights, cmap=heat, norm=norm, extent=extent_of(weights.shape, view.spacing))
            axes.set(xlim=(box.left, box.left + box.width), ylim=(box.top + box.height, box.top))
            if notes is not None:
                _note(axes, notes[row][column - 1])
    _add_scale(figure, norm, heat, "weight, in multiples of an even average", legend_height(legend), open_ended=True)
    legend_below(figure, legend)
    return figure


def _add_panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes for a picture, at a place in inches."""
    axes = add_axes(figure, left, bottom, width, height)
    axes.set(xticks=[], yticks=[], facecolor="black")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes


def _view_of(inspection: Inspection) -> tuple[View, Box]:
    """The slice turned for the eye, and the whole of it."""
    view = view_slice(
        inspection.image, inspection.label, inspection.label, inspection.spacing, inspection.axes, inspection.position
    )
    height, width = np.multiply(inspection.label.shape, inspection.spacing).tolist()
    return view, Box(0, 0, width, height)


def _small(room: float) -> dict[str, Any]:
    """Letters that fit `room` inches."""
    return {"fontsize": FONT_SIZE if room > 0.6 else FONT_SIZE - 3, "color": MUTED}


def _head_line(figure: Figure, title: str, remark: str) -> None:
    top = 1 - 0.16 / figure.get_figheight()
    figure.text(0, top, title, fontsize=FONT_SIZE, color=INK, weight="bold")
    figure.text(1, top, remark, fontsize=FONT_SIZE, color=MUTED, ha="right")


def _note(axes: Axes, text: str) -> None:
    outline = [withStroke(linewidth=2, foreground="black")]
    axes.text(
        0.97, 0.03, text, ha="right", va="bottom", color="white", fontsize=8, transform=axes.transAxes,
        path_effects=outline,
    )  # fmt: skip


def _add_scale(
    figure: Figure,
    norm: Normalize,
    colours: str | ListedColormap,
    name: str,
    bottom: float = 0.0,
    *,
    open_ended: bool = False,
) -> None:
    """A bar of colours above `bottom` inches, with numbers and a name below it; an arrow where there may be more."""
    axes = add_axes(figure, WIDTH / 4, bottom + 0.4, WIDTH / 2, 0.08)
    axes.set_facecolor("black")
    axes.grid(visible=False)
    bar = figure.colorbar(
        ScalarMappable(norm, colours), cax=axes, orientation="horizontal", extend="max" if open_ended else "neither"
    )
    bar.outline.set_visible(False)
    bar.set_label(name, fontsize=FONT_SIZE, color=INK)
