"""Resampling of volumes to another grid by nnU-Net's rules, pixel centres mapped as `scale * (i + 0.5) - 0.5`.

A scan may have 2e8 voxels and a hundred classes, so nothing here holds more than the result, one slab of it, and what
it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

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
    image: NDArray[np.float32], shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> NDArray[np.float32]:
    """Cubic splines, clipped to the range of the input: (C, D, H, W) float32 -> (C, *shape) float32.

    The numbers of `skimage.transform.resize(order=3, mode="edge", anti_aliasing=False)` to the rounding of float32,
    per slice when an axis is separate (nnU-Net's order 3 in the plane, order 0 across). `image` itself comes back when
    it has that shape already.
    """
    if image.shape[1:] == tuple(shape):
        return image
    axis = _slicing_axis(image.shape[1:], shape, spacing, new_spacing)
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
    axis = separate_axis(spacing, new_spacing)
    lower, shares = _places(old_shape[0], shape[0], nearest=axis == 0)
    numbered = enumerate(planes)
    held: dict[int, Tensor] = {}
    for index, share in zip(lower, shares, strict=True):
        needed = (index, index + 1) if share else (index,)
        held = {number: plane for number, plane in held.items() if number in needed}
        while needed[-1] not in held:
            number, plane = next(numbered)
            if number in needed:
                held[number] = _resample_plane(plane, shape[1:], None if not axis else axis - 1)
        yield _argmax_between(held[needed[0]], held[needed[-1]], share)


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


def _places(size: int, new_size: int, *, nearest: bool) -> tuple[list[int], list[float]]:
    """For each of `new_size` planes the one of `size` at or below its centre, and the share of the one above that."""
    if nearest or size == new_size:
        return nearest_indices(size, new_size).tolist(), [0.0] * new_size
    centres = ((np.arange(new_size) + 0.5) * (size / new_size) - 0.5).clip(0, size - 1)
    lower = np.floor(centres).astype(np.intp)
    return lower.tolist(), (centres - lower).tolist()


def _resample_plane(plane: Tensor, shape: Sequence[int], nearest: int | None) -> Tensor:
    """(K, H, W) -> (K, *shape) float32, a tensor of its own: linear, edges repeated; nearest along axis `nearest`."""
    if nearest is not None:
        indices = nearest_indices(plane.shape[1 + nearest], shape[nearest])
        plane = plane.index_select(1 + nearest, torch.from_numpy(indices).to(plane.device))
    if tuple(plane.shape[1:]) == tuple(shape):
        return plane.to(torch.float32, copy=True)
    return functional.interpolate(plane.float()[None], size=tuple(shape), mode="bilinear", align_corners=False)[0]


def _argmax_between(lower: Tensor, upper: Tensor, share: float) -> Tensor:
    """Two planes (K, H, W) -> (H, W) uint8, the largest class where `upper` has this share.

    Class by class, so that what is compared stays in a processor's cache.
    """
    best = torch.lerp(lower[0], upper[0], share)
    winner = torch.zeros_like(best, dtype=torch.uint8)
    for index in range(1, len(lower)):
        value = torch.lerp(lower[index], upper[index], share) if share else lower[index]
        winner.masked_fill_(value >= best, index)
        torch.maximum(best, value, out=best)
    return winner
