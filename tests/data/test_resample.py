"""Resampling gives the numbers of the coordinate map `scale * (i + 0.5) - 0.5`, computed another way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from utnetv2_fast.data.resample import (
    nearest_indices,
    resample_argmax,
    resample_image,
    resample_label,
    separate_axis,
)

SIZES = st.tuples(*[st.integers(1, 9)] * 3)
ISOTROPIC = (1.0, 1.0, 1.0)
THICK = {0: (9.0, 1.0, 1.0), 1: (1.0, 9.0, 1.0), 2: (1.0, 1.0, 9.0)}


def argmax(scores: torch.Tensor, shape: Sequence[int], *spacings: Sequence[float]) -> torch.Tensor:
    """`resample_argmax` of (K, D, H, W): all its planes together."""
    planes = list(resample_argmax(scores.unbind(1), scores.shape[1:], shape, *spacings))
    assert len(planes) == shape[0]
    return torch.stack(planes)


QUICK = settings(max_examples=40, deadline=None)


def centres(size: int, new_size: int) -> np.ndarray:
    return size / new_size * (np.arange(new_size) + 0.5) - 0.5


def sampled(array: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    """`array` at the centres of a grid of `shape` voxels over the same extent, in float64."""
    grid = np.meshgrid(*(centres(old, new) for old, new in zip(array.shape, shape, strict=True)), indexing="ij")
    return ndimage.map_coordinates(array.astype(np.float64), grid, order=order, mode="nearest")


def linear(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The same for order 1 without scipy: one matrix per axis."""
    for axis, new in enumerate(shape):
        old = array.shape[axis]
        place = centres(old, new).clip(0, old - 1)
        weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(old)))
        array = np.moveaxis(np.tensordot(weights, array.astype(np.float64), (1, axis)), 0, axis)
    return array


def random_image(shape: Sequence[int], channels: int = 2) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal((channels, *shape)).astype(np.float32)


@QUICK
@given(old=SIZES, new=SIZES)
def test_image_equals_cubic_spline_at_the_mapped_centres(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    image = random_image(old)
    result = resample_image(image, new, ISOTROPIC, ISOTROPIC)
    assert result.shape == (2, *new)
    assert result.dtype == np.float32
    kept = next((axis for axis in range(3) if old[axis] == new[axis]), None)
    for channel, out in zip(image, result, strict=True):
        expected = sampled(channel, new, order=3)
        if kept is None:
            expected = expected.clip(channel.min(), channel.max())
        else:  # the clip is per slice then
            bounds = [np.expand_dims(f(np.moveaxis(channel, kept, 0), (1, 2)), (1, 2)) for f in (np.min, np.max)]
            expected = np.moveaxis(np.moveaxis(expected, kept, 0).clip(*bounds), 0, kept)
        np.testing.assert_allclose(out, expected, atol=2e-6)


def test_a_ramp_stays_a_ramp() -> None:
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32), (1, 4, 6, 20))
    result = resample_image(ramp, (5, 7, 33), ISOTROPIC, ISOTROPIC)[0, 2, 3]
    np.testing.assert_allclose(result[5:-5], centres(20, 33)[5:-5], atol=2e-3)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", ["old", "new"])
def test_thick_slices_are_resampled_one_by_one(axis: int, which: str) -> None:
    old, new = [6, 6, 6], [9, 9, 9]
    old[axis], new[axis] = 3, 7
    image = random_image(old, channels=1)
    spacings = (THICK[axis], ISOTROPIC) if which == "old" else (ISOTROPIC, THICK[axis])
    result = np.moveaxis(resample_image(image, new, *spacings)[0], axis, 0)
    slices = np.moveaxis(image[0], axis, 0)
    plane = result.shape[1:]
    for index, place in enumerate(centres(3, 7)):
        source = slices[int(np.floor(place + 0.5))]
        expected = sampled(source, plane, order=3).clip(source.min(), source.max())
        np.testing.assert_allclose(result[index], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("spacing", "new_spacing", "axis"),
    [
        ((1, 1, 1), (1, 1, 1), None),
        ((3, 1, 1), (1, 1, 1), None),  # three times is not more than three times
        ((3.01, 1, 1), (1, 1, 1), 0),
        ((1, 1, 1), (1, 5, 1), 1),
        ((1, 1, 4), (5, 1, 1), 2),  # the current grid decides first
        ((5, 5, 1), (1, 1, 1), None),
        ((5, 5, 1), (9, 1, 1), None),
        ((1.25, 0.24, 1.2500001), (1, 1, 1), None),
    ],
)
def test_separate_axis(spacing: tuple, new_spacing: tuple, axis: int | None) -> None:
    assert separate_axis(spacing, new_spacing) == axis


@given(size=st.integers(1, 300), new_size=st.integers(1, 300))
def test_nearest_indices(size: int, new_size: int) -> None:
    indices = nearest_indices(size, new_size)
    distance = np.abs(np.arange(size)[None] - centres(size, new_size)[:, None])
    np.testing.assert_allclose(distance[np.arange(new_size), indices], distance.min(1), atol=1e-9)


def test_a_large_image_equals_scipys_zoom() -> None:
    """Long axes, of which the spline's matrix is cut into slabs; scipy takes all axes at once, in float64."""
    image = random_image((70, 45, 33), channels=1)
    new = (91, 31, 40)
    expected = ndimage.zoom(
        image[0].astype(np.float64),
        [n / o for n, o in zip(new, image.shape[1:], strict=True)],
        order=3,
        mode="nearest",
        grid_mode=True,
    )
    result = resample_image(image, new, ISOTROPIC, ISOTROPIC)[0]
    np.testing.assert_allclose(result, expected.clip(image.min(), image.max()), atol=3e-6)


@QUICK
@given(old=SIZES, new=SIZES, classes=st.integers(1, 5))
def test_label_is_the_class_with_the_largest_share(old: tuple[int, ...], new: tuple[int, ...], classes: int) -> None:
    label = np.random.default_rng(0).integers(0, classes, old).astype(np.uint8) * 50
    result = resample_label(label, new, ISOTROPIC, ISOTROPIC)
    shares = np.stack([linear(label == value, new) for value in range(0, 50 * classes, 50)])
    assert result.shape == new
    assert result.dtype == np.uint8
    won = np.take_along_axis(shares, result[None].astype(int) // 50, 0)[0]
    np.testing.assert_allclose(won, shares.max(0), atol=1e-5)


def test_label_between_two_classes_is_the_higher() -> None:
    label = np.array([0, 3], np.uint8).reshape(1, 1, 2)
    np.testing.assert_array_equal(resample_label(label, (1, 1, 3), ISOTROPIC, ISOTROPIC), [[[0, 3, 3]]])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_label_of_thick_slices_takes_no_value_from_its_neighbours(axis: int) -> None:
    old, new = [8, 8, 8], [12, 12, 12]
    old[axis], new[axis] = 4, 10
    label = np.random.default_rng(0).integers(0, 3, old).astype(np.uint8)
    result = np.moveaxis(resample_label(label, new, THICK[axis], ISOTROPIC), axis, 0)
    slices = np.moveaxis(label, axis, 0)
    for index, source in zip(range(10), nearest_indices(4, 10), strict=True):
        shares = np.stack([linear(slices[source] == value, result.shape[1:]) for value in range(3)])
        won = np.take_along_axis(shares, result[index][None].astype(int), 0)[0]
        np.testing.assert_allclose(won, shares.max(0), atol=1e-5)


@QUICK
@given(old=SIZES, new=SIZES, axis=st.sampled_from([None, 0, 1, 2]))
def test_argmax_of_scores(old: tuple[int, ...], new: tuple[int, ...], axis: int | None) -> None:
    scores = torch.randn(4, *old, dtype=torch.float64)
    spacing = ISOTROPIC if axis is None else THICK[axis]
    result = argmax(scores, new, spacing, ISOTROPIC)
    values = []
    for score in scores.numpy():
        if axis is not None:
            score = np.take(score, nearest_indices(old[axis], new[axis]), axis)
        values.append(linear(score, new))
    assert result.dtype == torch.uint8
    won = np.take_along_axis(np.stack(values), result.numpy()[None].astype(int), 0)[0]
    np.testing.assert_allclose(won, np.stack(values).max(0), atol=1e-5)


def test_scores_stay_as_they_were() -> None:
    scores = torch.randn(3, 4, 5, 6)
    before = scores.clone()
    result = argmax(scores, (4, 5, 6), ISOTROPIC, ISOTROPIC)
    assert torch.equal(scores, before)
    assert torch.equal(result, scores.argmax(0).to(torch.uint8))


@QUICK
@given(old=SIZES, new=SIZES, axis=st.sampled_from([None, 0, 1, 2]))
def test_argmax_of_scores_is_torchs_trilinear_one(old: tuple[int, ...], new: tuple[int, ...], axis: int | None) -> None:
    """Voxel by voxel, but where two classes are equal to rounding."""
    scores = torch.randn(5, *old)
    spacing = ISOTROPIC if axis is None else THICK[axis]
    nearest = scores
    if axis is not None:
        nearest = scores.index_select(1 + axis, torch.from_numpy(nearest_indices(old[axis], new[axis])))
    values = torch.nn.functional.interpolate(nearest[None], size=new, mode="trilinear", align_corners=False)[0]
    first, second = values.topk(2, 0).values
    sure = first - second > 1e-5
    assert torch.equal(argmax(scores, new, spacing, ISOTROPIC)[sure], values.argmax(0).to(torch.uint8)[sure])


def test_equal_scores_go_to_the_later_class() -> None:
    scores = torch.zeros(4, 3, 3, 3)
    scores[3] = -1
    assert (argmax(scores, (5, 5, 5), ISOTROPIC, ISOTROPIC) == 2).all()


@pytest.mark.parametrize("new", [2, 7, 40])
def test_a_plane_is_taken_when_it_is_needed_and_may_then_be_overwritten(new: int) -> None:
    scores = torch.randn(3, 11, 4, 5)
    shared = torch.empty(3, 4, 5)
    taken = 0

    def planes() -> Iterator[torch.Tensor]:
        nonlocal taken
        for plane in scores.unbind(1):
            taken += 1
            yield shared.copy_(plane)
            shared.fill_(float("nan"))

    result = []
    for index, plane in enumerate(resample_argmax(planes(), (11, 4, 5), (new, 4, 5), ISOTROPIC, ISOTROPIC)):
        result.append(plane.clone())
        assert taken <= 2 + centres(11, new)[index].clip(0)
    assert torch.equal(torch.stack(result), argmax(scores, (new, 4, 5), ISOTROPIC, ISOTROPIC))


def test_same_shape_changes_nothing() -> None:
    image = random_image((5, 6, 7))
    np.testing.assert_array_equal(resample_image(image, (5, 6, 7), THICK[0], THICK[0]), image)
    label = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(np.uint8)
    np.testing.assert_array_equal(resample_label(label, (5, 6, 7), THICK[1], THICK[1]), label)
