"""Pictures of segmentations: a telling slice of a case, and patches while a training runs.

Slices are shown as radiologists expect them, the patient's right on the left and anterior or superior at the top, in
millimetres, so that thick slices and long voxels have their true proportions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from contourpy import contour_generator
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from utnetv2_fast.evaluation.figures import (
    FONT_SIZE,
    INK,
    MUTED,
    WIDTH,
    add_axes,
    class_colour,
    legend_below,
    legend_height,
    new_figure,
    plain,
)

# Soft tissue, in Hounsfield units: centre 40, width 400.
CT_WINDOW = (-160.0, 240.0)

# The slices of a scan lie along the axis whose spacing exceeds the finest by this factor, else they are axial.
_THICK = 1.5
_ENDS = (("S", "I"), ("A", "P"), ("R", "L"))  # of the canonical axes z, y, x: where they lead, where they come from
_PLANES = ("axial", "coronal", "sagittal")
_OVERLAY_OPACITY = 0.55
_GAP, _TITLE = 0.1, 0.24  # inches between panels, and above each for its title
PANEL_TITLE: dict[str, Any] = {"loc": "left", "fontsize": FONT_SIZE, "color": MUTED, "pad": 3}
# Told apart by colour, by the colour-blind, and in grey.
_REFERENCE_LINE: dict[str, Any] = {"color": "#56B4E9", "lw": 1.5}
_PREDICTION_LINE: dict[str, Any] = {"color": "#E69F00", "lw": 1.5, "ls": (0, (2.2, 1.2))}
_MOST_NAMED = 7  # classes, beyond which the legend leaves out those that are not in the picture


@dataclass(frozen=True, eq=False)
class View:
    """One slice as it is shown: rows from top to bottom, columns from left to right.

    scan       (H, W), or None where there is none to show
    reference  (H, W) label values
    prediction (H, W) label values
    spacing    of rows and columns, in mm
    letters    the closest anatomical direction at the top, right, bottom and left
    position   in words, which slice it is
    """

    scan: NDArray[np.floating] | None
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    spacing: tuple[float, float]
    letters: tuple[str, str, str, str]
    position: str


@dataclass(frozen=True)
class Box:
    """A part of a view, in mm from its upper left corner."""

    left: float
    top: float
    width: float
    height: float


def telling_slice(
    reference: NDArray[np.uint8], prediction: NDArray[np.uint8], spacing: Sequence[float]
) -> tuple[int, int]:
    """(axis, index) of the slice of two label maps (Z, Y, X) where reference and errors together cover most.

    Errors alone would often choose a slice beyond the organ's end, with nothing to compare. Where nothing is labelled
    it is the middle slice. `spacing` is (z, y, x) in mm.
    """
    coarsest = int(np.argmax(spacing))
    axis = coarsest if spacing[coarsest] > _THICK * min(spacing) else 0
    others = tuple(other for other in range(3) if other != axis)
    counts = np.count_nonzero(reference, axis=others) + np.count_nonzero(reference != prediction, axis=others)
    return axis, int(np.argmax(counts)) if counts.any() else reference.shape[axis] // 2


def take_view(
    scan: NDArray[np.floating] | None,
    reference: NDArray[np.uint8],
    prediction: NDArray[np.uint8],
    spacing: Sequence[float],
    axis: int,
    index: int,
) -> View:
    """Slice `index` along `axis` of a canonical scan and its label maps (Z, Y, X) with spacing (z, y, x) in mm."""
    row, column = (other for other in range(3) if other != axis)
    return view_slice(
        None if scan is None else np.take(scan, index, axis),
        np.take(reference, index, axis),
        np.take(prediction, index, axis),
        (spacing[row], spacing[column]),
        (row, column),
        f"{_PLANES[axis]} slice {index + 1} of {reference.shape[axis]}",
    )


def view_slice(
    scan: NDArray[np.floating] | None,
    reference: NDArray[np.uint8],
    prediction: NDArray[np.uint8],
    spacing: tuple[float, float],
    axes: tuple[int, int],
    position: str = "",
) -> View:
    """A slice (H, W), turned for the eye; `axes` are the canonical ones (z, y, x) of its rows and columns."""
    # Canonical axes lead to superior, anterior and right: all of them belong at the top or on the left.
    turned = np.s_[::-1, ::-1]
    (top, bottom), (left, right) = (_ENDS[axis] for axis in axes)
    return View(
        scan=None if scan is None else scan[turned],
        reference=reference[turned],
        prediction=prediction[turned],
        spacing=spacing,
        letters=(top, right, bottom, left),
        position=position,
    )


def field_of_view(view: View) -> Box:
    """The square around everything that is labelled, with half as much again around it, inside the slice if it fits.

    The whole slice where nothing is labelled.
    """
    size = np.multiply(view.reference.shape, view.spacing)
    labelled = np.argwhere((view.reference != 0) | (view.prediction != 0))
    if len(labelled):
        first, last = labelled.min(axis=0) * view.spacing, (labelled.max(axis=0) + 1) * view.spacing
        centre, side = (first + last) / 2, max(1.6 * (last - first).max(), 40 * min(view.spacing))
    else:
        centre, side = size / 2, size.max()
    side = min(side, size.max())
    start = np.where(size > side, np.clip(centre - side / 2, 0, size - side), (size - side) / 2)
    top, left = start.tolist()
    return Box(left, top, side, side)


def draw_case(view: View, labels: Sequence[str], title: str, window: tuple[float, float] | None = None) -> Figure:
    """Scan, reference, prediction, and both contours on the scan.

    `labels` names the foreground classes (values 1, 2, ...), `window` the intensities that become black and white.
    """
    box = field_of_view(view)
    contour_key = [
        Line2D([], [], **_REFERENCE_LINE, label="contour of the reference"),
        Line2D([], [], **_PREDICTION_LINE, label="of the prediction"),
    ]
    figure, panels = _lay_out(
        2, 2, plain(title, 32), view.position, contour_key, class_handles([view], labels), every_row_named=True
    )
    for axes, name in zip(panels, ("Scan", "Reference", "Prediction", "Contours"), strict=True):
        show_scan(axes, view, box, window or percentile_window(view, box))
        axes.set_title(name, **PANEL_TITLE)
    scan, reference, prediction, contours = panels
    mark_geometry(scan, view, box)
    overlay_classes(reference, view.reference, view.spacing)
    overlay_classes(prediction, view.prediction, view.spacing)
    for label, style in ((view.reference, _REFERENCE_LINE), (view.prediction, _PREDICTION_LINE)):
        for line in contour_lines(label, view.spacing):
            contours.plot(*line.T, **style, path_effects=[withStroke(linewidth=2.6, foreground="black", alpha=0.6)])
    return figure


def draw_comparison(
    view: View,
    predictions: Sequence[tuple[str, NDArray[np.uint8]]],
    labels: Sequence[str],
    title: str,
    window: tuple[float, float] | None = None,
) -> Figure:
    """Scan, reference, and what several networks made of the same slice: [(name, (H, W) as it is shown)]."""
    shown = [view, *(replace(view, prediction=prediction) for _, prediction in predictions)]
    everything = np.stack([view.reference, *(prediction for _, prediction in predictions)]).max(axis=0)
    box = field_of_view(replace(view, prediction=everything))
    names = ["Scan", "Reference", *(plain(name, 26) for name, _ in predictions)]
    columns = 3
    rows = -(-len(names) // columns)
    figure, panels = _lay_out(
        rows, columns, plain(title, 40), view.position, class_handles(shown, labels), every_row_named=True
    )
    for axes, name in zip(panels, names, strict=False):
        show_scan(axes, view, box, window or percentile_window(view, box))
        axes.set_title(name, **PANEL_TITLE)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    mark_geometry(panels[0], view, box)
    for axes, label in zip(panels[1:], [view.reference, *(p for _, p in predictions)], strict=False):
        overlay_classes(axes, label, view.spacing)
    return figure


def draw_patches(views: Sequence[View], labels: Sequence[str], title: str) -> Figure:
    """Scan, reference and prediction of one or more patches, a row each."""
    figure, panels = _lay_out(len(views), 3, plain(title, 60), "", class_handles(views, labels), every_row_named=False)
    for axes, name in zip(panels, ("Scan", "Reference", "Prediction"), strict=False):
        axes.set_title(name, **PANEL_TITLE)
    for row, view in enumerate(views):
        scan, reference, prediction = panels[3 * row : 3 * row + 3]
        height, width = np.multiply(view.reference.shape, view.spacing).tolist()
        side = max(height, width)
        box = Box((width - side) / 2, (height - side) / 2, side, side)
        for axes in (scan, reference, prediction):
            show_scan(axes, view, box, percentile_window(view, box))
        mark_geometry(scan, view, box)
        overlay_classes(reference, view.reference, view.spacing)
        overlay_classes(prediction, view.prediction, view.spacing)
    return figure


def _lay_out(
    rows: int, columns: int, title: str, remark: str, *legends: Sequence[Artist], every_row_named: bool
) -> tuple[Figure, list[Axes]]:
    """A figure of square panels, row by row, under a title and a remark to its right, above legends."""
    side = (WIDTH - (columns - 1) * _GAP) / columns
    title_above = _TITLE if every_row_named else _GAP
    bottom = sum(map(legend_height, legends))
    height = bottom + rows * (side + title_above) + 0.2 + (_TITLE - title_above)
    figure = new_figure(height)
    figure.text(0, 1 - 0.16 / height, title, fontsize=FONT_SIZE, color=INK, weight="bold")
    figure.text(1, 1 - 0.16 / height, remark, fontsize=FONT_SIZE, color=MUTED, ha="right")
    panels = []
    for row in range(rows):
        for column in range(columns):
            lower = bottom + (rows - 1 - row) * (side + title_above)
            axes = add_axes(figure, column * (side + _GAP), lower, side, side)
            axes.set(xticks=[], yticks=[], facecolor="black")
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            panels.append(axes)
    for legend in legends:
        bottom -= legend_height(legend)
        legend_below(figure, legend, bottom)
    return figure, panels


def show_scan(axes: Axes, view: View, box: Box, window: tuple[float, float]) -> None:
    """The grey scan in `box`, one unit of the axes a millimetre."""
    if view.scan is not None:
        low, high = window
        image = view.scan.astype(np.float32)
        extent = extent_of(image.shape, view.spacing)
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bicubic")
    axes.set_aspect("equal")
    axes.set_xlim(box.left, box.left + box.width)
    axes.set_ylim(box.top + box.height, box.top)


def overlay_classes(axes: Axes, label: NDArray[np.uint8], spacing: tuple[float, float]) -> None:
    """Every class in its colour over the scan, voxel by voxel."""
    colours = np.zeros((256, 4), dtype=np.float32)
    for value in range(1, 256):
        colours[value] = to_rgba(class_colour(value - 1), _OVERLAY_OPACITY)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(colours[label], extent=extent_of(label.shape, spacing), interpolation="nearest")
    axes.set(xlim=limits[0], ylim=limits[1])


def contour_lines(label: NDArray[np.uint8], spacing: tuple[float, float]) -> list[NDArray[np.float64]]:
    """The borders of the classes in a slice as lines (n, 2) of x and y in mm; a border that two share comes once.

    Drawn twice, out of step, its dashes would fill their own gaps.
    """
    # A ring of background closes the contours of what touches the edge.
    padded = np.pad(label, 1)
    y, x = ((np.arange(n) - 0.5) * mm for n, mm in zip(padded.shape, spacing, strict=True))
    drawn: set[frozenset[tuple[float, ...]]] = set()
    parts: list[list[tuple[float, ...]]] = []
    for value in np.unique(label[label != 0]):
        for line in contour_generator(x, y, (padded == value).astype(float)).lines(0.5):
            points = [tuple(point) for point in np.asarray(line).round(6).tolist()]
            parts.append(points[:1])
            for start, end in pairwise(points):
                if (piece := frozenset((start, end))) in drawn:
                    parts.append([end])
                else:
                    drawn.add(piece)
                    parts[-1].append(end)
    return [np.array(part) for part in parts if len(part) > 1]


def mark_geometry(axes: Axes, view: View, box: Box) -> None:
    """Where the patient's sides are, and a bar of a round length."""
    ink: dict[str, Any] = {
        "color": "white",
        "fontsize": 8,
        "path_effects": [withStroke(linewidth=2, foreground="black")],
        "transform": axes.transAxes,
    }
    top, right, bottom, left = view.letters
    axes.text(0.5, 0.985, top, ha="center", va="top", **ink)
    axes.text(0.5, 0.015, bottom, ha="center", va="bottom", **ink)
    axes.text(0.015, 0.5, left, ha="left", va="center", **ink)
    axes.text(0.985, 0.5, right, ha="right", va="center", **ink)
    length = _round_length(box.width / 3.5)
    x = np.array([0.97 - length / box.width, 0.97])
    axes.plot(
        x, [0.05, 0.05], color="white", lw=2, transform=axes.transAxes, path_effects=[withStroke(linewidth=3.5)],
        solid_capstyle="butt",
    )  # fmt: skip
    axes.text(0.97, 0.065, f"{length:g} mm", ha="right", va="bottom", **ink)


def _round_length(longest: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not longer."""
    power = 10.0 ** math.floor(math.log10(longest))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= longest)


def class_handles(views: Sequence[View], labels: Sequence[str]) -> list[Patch]:
    """A swatch per class; of many classes only those that are in view."""
    shown: Sequence[int] = range(len(labels))
    if len(labels) > _MOST_NAMED:
        seen = {int(v) for view in views for label in (view.reference, view.prediction) for v in np.unique(label)}
        shown = [index for index in shown if index + 1 in seen]
    return [Patch(facecolor=class_colour(index), label=plain(labels[index])) for index in shown]


def percentile_window(view: View, box: Box) -> tuple[float, float]:
    """What becomes black and what white in `box`: the 1st and the 99.5th percentile of it."""
    if view.scan is None:
        return 0.0, 1.0
    rows, columns = (
        slice(max(0, int(start / mm)), int(np.ceil((start + length) / mm)))
        for start, length, mm in zip((box.top, box.left), (box.height, box.width), view.spacing, strict=True)
    )
    low, high = np.percentile(view.scan[rows, columns].astype(np.float32), (1, 99.5)).tolist()
    return low, high if high > low else low + 1


def extent_of(shape: Sequence[int], spacing: tuple[float, float]) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) of an image in mm from its upper left corner."""
    return 0, shape[1] * spacing[1], shape[0] * spacing[0], 0
