"""Pictures show the telling slice in its true proportions, the patient's right on the left, each border once."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from utnetv2_fast.evaluation.figures import class_colour, png
from utnetv2_fast.evaluation.pictures import (
    View,
    contour_lines,
    draw_case,
    draw_patches,
    field_of_view,
    take_view,
    telling_slice,
)

LABELS = ("disc", "core")


def pixels(figure: Figure) -> NDArray[np.float32]:
    """(height, width, 3) as anyone sees the file."""
    return np.asarray(imread(io.BytesIO(png(figure)), format="png"))[..., :3]


def disc(spacing: tuple[float, float], radius: float = 30.0, size: float = 96.0) -> NDArray[np.uint8]:
    """A disc of `radius` mm in a slice of `size` mm, round in mm whatever the voxels."""
    y, x = (np.arange(0.5, round(size / mm)) * mm - size / 2 for mm in spacing)
    return (np.hypot(y[:, None], x[None, :]) < radius).astype(np.uint8)


def view(reference: NDArray[np.uint8], prediction: NDArray[np.uint8], spacing: tuple[float, float]) -> View:
    scan = np.zeros(reference.shape, np.float32)
    scan[0, 0] = 1
    return View(scan, reference, prediction, spacing, ("A", "L", "P", "R"), "axial slice 1 of 1")


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (4.0, 1.0), (1.0, 6.0)])
def test_a_round_organ_is_round_on_the_page(spacing: tuple[float, float]) -> None:
    mask = disc(spacing)
    image = pixels(draw_case(view(mask, np.zeros_like(mask), spacing), LABELS, "case"))
    height, width, _ = image.shape
    reference = image[: height // 2, width // 2 :]
    blue = np.argwhere(reference[..., 2] - reference[..., 0] > 0.2)
    tall, wide = (np.ptp(blue, axis=0) + 1).tolist()
    assert tall == pytest.approx(wide, rel=0.12)  # voxels of 6 mm do not make a smooth disc of 60 mm
    assert tall > 0.2 * height


def test_the_slice_is_the_one_where_reference_and_errors_cover_most() -> None:
    reference = np.zeros((6, 8, 8), np.uint8)
    reference[1, 1:6, 1:6] = 1
    reference[2, 2:6, 2:6] = 1
    prediction = reference.copy()
    prediction[4, 1:6, 1:5] = 1  # made up beyond the organ: less than the organ itself
    assert telling_slice(reference, prediction, (5, 1, 1)) == (0, 1)
    prediction[2, 2:6, 2:6] = 2  # the wrong class
    assert telling_slice(reference, prediction, (5, 1, 1)) == (0, 2)
    assert telling_slice(reference, prediction, (1, 1.2, 1)) == (0, 2)
    assert telling_slice(reference, prediction, (1, 1, 5))[0] == 2
    prediction[4] = 1  # far more than the organ
    assert telling_slice(reference, prediction, (5, 1, 1)) == (0, 4)
    empty = np.zeros_like(reference)
    assert telling_slice(empty, empty, (5, 1, 1)) == (0, 3)


@pytest.mark.parametrize(
    ("axis", "letters", "spacing"),
    [(0, ("A", "L", "P", "R"), (2, 3)), (1, ("S", "L", "I", "R"), (1, 3)), (2, ("S", "P", "I", "A"), (1, 2))],
)
def test_superior_and_anterior_are_at_the_top_and_right_on_the_left(
    axis: int, letters: tuple[str, str, str, str], spacing: tuple[int, int]
) -> None:
    """In canonical order the last voxel of every axis is the most superior, anterior, right one."""
    scan = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    label = (scan == scan.max()).astype(np.uint8)
    taken = take_view(scan, label, label, (1, 2, 3), axis, scan.shape[axis] - 1)
    assert taken.scan is not None
    assert taken.scan[0, 0] == scan.max()
    assert taken.reference[0, 0] == taken.prediction[0, 0] == 1
    assert taken.letters == letters
    assert taken.spacing == spacing
    assert taken.position.endswith(f"slice {scan.shape[axis]} of {scan.shape[axis]}")


def test_everything_labelled_is_in_view() -> None:
    reference, prediction = np.zeros((2, 100, 400), np.uint8)
    reference[40:50, 40:60] = 1
    prediction[95:100, 395:400] = 2  # far away and at the edge
    box = field_of_view(view(reference, prediction, (2.0, 0.5)))
    assert box.left <= 20
    assert box.left + box.width >= 200
    assert box.top <= 80
    assert box.top + box.height >= 200
    small = field_of_view(view(reference, reference, (2.0, 0.5)))
    assert small.width == small.height < 60
    whole = field_of_view(view(np.zeros_like(reference), np.zeros_like(reference), (2.0, 0.5)))
    assert (whole.width, whole.height) == (200, 200)


def test_borders_enclose_their_class_and_shared_ones_come_once() -> None:
    label = np.zeros((6, 8), np.uint8)
    label[:, :4] = 1  # touches three edges
    label[:, 4:] = 2
    pieces = [
        (tuple(start), tuple(end))
        for line in contour_lines(label, (2.0, 3.0))
        for start, end in zip(line[:-1].tolist(), line[1:].tolist(), strict=True)
    ]
    assert len({frozenset(piece) for piece in pieces}) == len(pieces)
    shared = [piece for piece in pieces if {12.0} == {round(x, 6) for x, _ in piece}]
    assert sum(math.dist(*piece) for piece in shared) == pytest.approx(10, abs=2)  # 6 rows of 2 mm, less the corners
    points = np.array(pieces).reshape(-1, 2)
    np.testing.assert_allclose(points.min(axis=0), (0, 0), atol=1e-6)
    np.testing.assert_allclose(points.max(axis=0), (24, 12), atol=1e-6)


@pytest.mark.parametrize("name", ["$x_1$", "$\\frac$", "_hidden", "a" * 300, "Herz 心", "two\nlines", "<b>"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_can_be_drawn(name: str) -> None:
    mask = disc((1.0, 1.0))
    draw_case(view(mask, mask, (1.0, 1.0)), (name,), name).canvas.draw()  # type: ignore[attr-defined]


def test_what_is_missing_is_left_out() -> None:
    """No scan, no label in either map, a constant scan, many classes of which one is in view."""
    mask = disc((1.0, 1.0))
    none = View(None, mask, mask, (1.0, 1.0), ("A", "L", "P", "R"), "")
    constant = View(np.zeros(mask.shape, np.float16), mask * 0, mask * 0, (1.0, 1.0), ("A", "L", "P", "R"), "")
    for shown in (none, constant):
        assert pixels(draw_case(shown, LABELS, "case")).shape[1] == 960
    many = draw_patches([none, constant], [f"class {i}" for i in range(30)], "title")
    assert [text.get_text() for text in many.legends[0].get_texts()] == ["class 0"]


def test_classes_keep_their_colours_and_colours_differ() -> None:
    assert len({class_colour(index) for index in range(14)}) == 14
    assert class_colour(14) == class_colour(0)
