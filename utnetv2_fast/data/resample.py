"""Resampling of volumes to another grid by nnU-Net's rules, pixel centres mapped as `scale * (i + 0.5) - 0.5`.

A scan may have 2e8 voxels and a hundred classes, so nothing here holds more than the result, one slab of it, and what
it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

# nnU-Net's ANISO_THRESHOLD: slices thicker than this many in-plane voxels are resampled one by one.
ANISOTROPY_THRESHOLD = 3.0

_PLANES_PER_SLAB = 16
# The weights of a cubic spline fall by 0.27 from voxel to voxel; those below this are lost in float32 anyway.
_SMALLEST_WEIGHT = 1e-9


def separate_axis(spacing: Sequence[float], new_spacing: Sequence[float]) -> int | None:
    """The axis along which nearest neighbours are taken while the plane across it is interpolated, or None.

    nnU-Net's rule: the coarsest axis of the current grid if it is more than three times coarser than the finest,
    else that of the new grid; none when two axes are equally coarse.
    """
    for candidate in (np.asarray(spacing), np.asarray(new_spacing)):
        if candidate.max() / candidate.min() > ANISOTROPY_THRESHOLD:
            coarsest = np.flatnonzero(np.isclose(candidate, candidate.max(), rtol=1e-4))
            return int(coarsest[0]) if len(coarsest) == 1 else None
    return None


def nearest_indices(size: int, new_size: int) -> NDArray[np.intp]:
    """For each of `new_size` voxels the nearest of `size`, in integers so that ties fall alike everywhere."""
    return (2 * np.arange(new_size) + 1) * size // (2 * new_size)


def resample_image(
    image: NDArray[np.float32],
    shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    separate: int | None = None,
) -> NDArray[np.float32]:
    """Cubic splines, clipped to the range of the input: (C, D, H, W) float32 -> (C, *shape) float32.

    The numbers of `skimage.transform.resize(order=3, mode="edge", anti_aliasing=False)` to the rounding of float32,
    per slice when an axis is separate (nnU-Net's order 3 in the plane, order 0 across). `separate` names that axis
    whatever the spacings are. `image` itself comes back when it has that shape already.
    """
    if image.shape[1:] == tuple(shape):
        return image
    axis = _slicing_axis(image.shape[1:], shape, spacing, new_spacing) if separate is None else separate
    result = np.empty((len(image), *shape), dtype=np.float32)
    for channel, out in zip(image, result, strict=True):
        if axis is None:
            _zoom(channel, out)
            continue
        slices, out_slices = np.moveaxis(channel, axis, 0), np.moveaxis(out, axis, 0)
        last, zoomed = -1, out_slices[0]
        for out_slice, index in zip(out_slices, nearest_indices(len(slices), len(out_slices)), strict=True):
            if index == last:
                out_slice[...] = zoomed
            else:
                _zoom(slices[index], out_slice)
            last, zoomed = index, out_slice
    return result


def resample_label(
    label: NDArray[np.uint8], shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> NDArray[np.uint8]:
    """The class whose linearly interpolated indicator is largest: (D, H, W) uint8 -> shape uint8.

    nnU-Net's order 1 (order 0 across slices). Where several classes meet and none reaches one half, nnU-Net leaves
    background; here the largest wins.
    """
    counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in label)
    classes = np.flatnonzero(counts).astype(np.uint8)
    indicators = (torch.from_numpy(plane == classes[:, None, None]) for plane in label)
    result = np.empty(shape, dtype=np.uint8)
    for out, winner in zip(result, resample_argmax(indicators, label.shape, shape, spacing, new_spacing), strict=True):
        out[...] = classes[winner.numpy()]
    return result


def resample_nearest(label: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.uint8]:
    """The nearest voxel: (D, H, W) -> shape."""
    indices = (nearest_indices(old, new) for old, new in zip(label.shape, shape, strict=True))
    return np.ascontiguousarray(label[np.ix_(*indices)])


def resample_argmax(
    planes: Iterable[Tensor],
    old_shape: Sequence[int],
    shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> Iterator[Tensor]:
    """Which class is largest after linear resampling, plane by plane; ties go to the later class.

    Takes D planes (K, H, W) of any dtype, those of a volume of `old_shape` (D, H, W), and gives `shape[0]` planes
    `shape[1:]` uint8, on their device. A plane is asked for when it is needed and no longer looked at when the next
    one is asked for: on the grid of a large CT the scores of all classes would fit nowhere.
    """
    thick = separate_axis(spacing, new_spacing)
    along, rows, columns = (
        _places(old, new, nearest=axis == thick) for axis, (old, new) in enumerate(zip(old_shape, shape, strict=True))
    )
    numbered = enumerate(planes)
    held: dict[int, _Plane] = {}
    for below, above, share in zip(along.below.tolist(), along.above.tolist(), along.share.tolist(), strict=True):
        held = {number: plane for number, plane in held.items() if number in (below, above)}
        while above not in held:
            number, scores = next(numbered)
            if number in (below, above):
                held[number] = _plane(scores.to(torch.float32, copy=True), rows, columns)
        yield _argmax_between(held[below], held[above], share, rows, columns)


def _slicing_axis(
    old_shape: Sequence[int], shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> int | None:
    """The separate axis, or one that keeps its size: interpolating along that would change nothing."""
    axis = separate_axis(spacing, new_spacing)
    if axis is not None:
        return axis
    return next((axis for axis, (old, new) in enumerate(zip(old_shape, shape, strict=True)) if old == new), None)


def _zoom(array: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write the cubic spline through `array`, two- or three-dimensional, at the places of `out`, within its range.

    A spline is interpolated along one axis after another, each time by the matrix of that axis: a whole volume in
    float64, as `ndimage.zoom` takes it, is nowhere needed, and matrix products use what the machine has.
    """
    if array.shape == out.shape:
        out[...] = array
        return
    low, high = float(array.min()), float(array.max())
    first, *others = (_spline_matrix(old, new) for old, new in zip(array.shape, out.shape, strict=True))
    for start in range(0, len(out), _PLANES_PER_SLAB):
        rows = first[start : start + _PLANES_PER_SLAB]
        columns = torch.nonzero(rows.abs().amax(0) > _SMALLEST_WEIGHT).flatten().tolist()
        begin, end = columns[0], columns[-1] + 1
        slab = torch.tensordot(rows[:, begin:end], torch.from_numpy(np.ascontiguousarray(array[begin:end])), 1)
        for axis, matrix in enumerate(others, start=1):
            if len(matrix) != array.shape[axis]:
                slab = (matrix @ slab.movedim(axis, -2)).movedim(-2, axis)
        out[start : start + _PLANES_PER_SLAB] = slab.clamp_(low, high).numpy()


@lru_cache(maxsize=64)
def _spline_matrix(size: int, new_size: int) -> Tensor:
    """(new_size, size) float32: the spline through a unit at each voxel, at the new places."""
    if size == new_size:
        return torch.eye(size)
    units = np.eye(size)
    zoomed = ndimage.zoom(units, (new_size / size, 1), order=3, mode="nearest", grid_mode=True)
    return torch.from_numpy(zoomed.astype(np.float32))


@dataclass(frozen=True)
class _Places:
    """Between which voxels those of another grid lie along one axis, and the share of the one above: (new_size,) each.

    Where the share is 0 the two are the same.
    """

    below: Tensor
    above: Tensor
    share: Tensor


def _places(size: int, new_size: int, *, nearest: bool) -> _Places:
    if nearest:
        below = nearest_indices(size, new_size)
        share = np.zeros(new_size)
    else:
        centres = ((np.arange(new_size) + 0.5) * (size / new_size) - 0.5).clip(0, size - 1)
        below = np.floor(centres).astype(np.intp)
        share = centres - below
    above = torch.from_numpy(below + (share > 0))
    return _Places(torch.from_numpy(below), above, torch.from_numpy(share.astype(np.float32)))


@dataclass(frozen=True)
class _Plane:
    """Scores (K, H, W) float32, and at every place of the new plane the class that leads at all corners around it.

    agreed   (H', W') int16, -1 where the corners differ
    """

    scores: Tensor
    agreed: Tensor


def _plane(scores: Tensor, rows: _Places, columns: _Places) -> _Plane:
    agreed = _last_argmax(scores).to(torch.int16)
    for axis, places in enumerate((rows, columns)):
        below, above = (
            agreed.index_select(axis, indices.to(scores.device)) for indices in (places.below, places.above)
        )
        agreed = torch.where(below == above, below, -1)
    return _Plane(scores, agreed)


def _argmax_between(below: _Plane, above: _Plane, share: float, rows: _Places, columns: _Places) -> Tensor:
    """(H', W') uint8: the largest class where `above` has this share.

    Interpolation keeps the order of two classes that have one order at all eight corners. So only the few places
    between different classes are interpolated, those at the borders of structures.
    """
    label = torch.where(below.agreed == above.agreed, below.agreed, -1)
    open_places = torch.nonzero(label.flatten() < 0).flatten()
    if len(open_places):
        row, column = open_places // label.shape[1], open_places % label.shape[1]
        values = _interpolate(below.scores, row, column, rows, columns)
        if share:
            values.lerp_(_interpolate(above.scores, row, column, rows, columns), share)
        label.view(-1)[open_places] = _last_argmax(values).to(torch.int16)
    return label.to(torch.uint8)


def _interpolate(scores: Tensor, row: Tensor, column: Tensor, rows: _Places, columns: _Places) -> Tensor:
    """(K, H, W) -> (K, n) at n places, linearly, edges repeated."""
    top, bottom, down = (part.to(row.device)[row] for part in (rows.below, rows.above, rows.share))
    left, right, across = (part.to(row.device)[column] for part in (columns.below, columns.above, columns.share))
    flat, width = scores.flatten(1), scores.shape[2]
    upper, lower = (
        torch.lerp(flat.index_select(1, y * width + left), flat.index_select(1, y * width + right), across)
        for y in (top, bottom)
    )
    return torch.lerp(upper, lower, down)


def _last_argmax(scores: Tensor) -> Tensor:
    """(K, ...) -> (...) uint8, the largest class, the last of equal ones."""
    best = scores[0].clone()
    winner = torch.zeros_like(best, dtype=torch.uint8)
    leads = torch.zeros_like(best, dtype=torch.bool)
    for index in range(1, len(scores)):
        torch.ge(scores[index], best, out=leads)
        # In bytes: torch fills by a mask, and takes an argmax along the first axis, many times slower.
        torch.maximum(winner, leads.view(torch.uint8).mul_(index), out=winner)
        torch.maximum(best, scores[index], out=best)
    return winner
