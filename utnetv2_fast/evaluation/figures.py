"""What all figures share: size, colours, the way to a file. Drawn by Agg alone, without the global state of pyplot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utnetv2_fast.files import atomic_write

# Inches. On a phone, 340 points wide, the labels of this width still have the size of a footnote.
WIDTH = 4.8
_DOTS_PER_INCH = 200
FONT_SIZE = 9

INK = "#1a1a1a"
MUTED = "#595959"
RULE = "#d9d9d9"

# Okabe and Ito's palette, which the colour-blind can tell apart, then Tol's "muted" for datasets of many classes.
_CLASS_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"),
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#882255"),
)


def class_colour(index: int) -> str:
    """The colour of the foreground class of this index (0 for label 1); they repeat after fourteen."""
    return _CLASS_COLOURS[index % len(_CLASS_COLOURS)]


def new_figure(height: float) -> Figure:
    """A white figure of the common width and `height` inches, with axes to be placed by hand."""
    figure = Figure(figsize=(WIDTH, height), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the lower left corner, with quiet spines and ticks."""
    whole_width, whole_height = figure.get_size_inches()
    axes = figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    axes.tick_params(labelsize=FONT_SIZE, labelcolor=INK, color=MUTED, width=0.8, length=3)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def label_axes(axes: Axes, x: str, y: str = "") -> None:
    """Name the axes, with their units."""
    axes.set_xlabel(x, fontsize=FONT_SIZE, color=INK)
    axes.set_ylabel(y, fontsize=FONT_SIZE, color=INK)


def plain(name: str, longest: int = 24) -> str:
    """A name as matplotlib shows it letter for letter: no formulas, no hidden labels, cut when it is long."""
    name = name if len(name) <= longest else name[: longest - 1] + "…"
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def legend_height(handles: Sequence[Artist]) -> float:
    """The inches that `legend_below` needs for these handles."""
    return 0.06 + 0.2 * -(-len(handles) // _legend_columns(handles))


def legend_below(figure: Figure, handles: Sequence[Artist], bottom: float = 0.0) -> None:
    """A legend `bottom` inches above the lower edge, read row by row, in as many columns as fit."""
    columns = _legend_columns(handles)
    by_column = [handle for column in range(columns) for handle in handles[column::columns]]
    figure.legend(
        handles=by_column,
        loc="lower center",
        bbox_to_anchor=(0.5, bottom / figure.get_figheight()),
        ncols=columns,
        frameon=False,
        fontsize=FONT_SIZE,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.2,
        handletextpad=0.5,
        borderaxespad=0.1,
        borderpad=0.1,
        labelspacing=0.35,
    )


def _legend_columns(handles: Sequence[Artist]) -> int:
    widths = [0.42 + 0.07 * len(str(handle.get_label())) for handle in handles]
    if sum(widths) <= WIDTH:
        return max(1, len(widths))
    return max(1, int(WIDTH / max(widths)))


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def write_png(file: Path, content: bytes) -> None:
    """Write a picture so that whoever looks while a training runs never sees half of one."""
    with atomic_write(file) as temporary:
        temporary.write_bytes(content)
