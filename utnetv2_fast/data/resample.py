"""Resampling of volumes to another grid by nnU-Net's rules, pixel centres mapped as `scale * (i + 0.5) - 0.5`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

# nnU-Net's ANISO_THRESHOLD: slices thicker than this many in-plane voxels are resampled one by one.
ANISOTROPY_THRESHOLD = 3.0


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

    The same numbers as `skimage.transform.resize(order=3, mode="edge", anti_aliasing=False)`, per slice when an axis
    is separate (nnU-Net's order 3 in the plane, order 0 across). `separate` names that axis whatever the spacings are.
    """
    axis = _slicing_axis(image.shape[1:], shape, spacing, new_spacing) if separate is None else separate
    result = np.empty((len(image), *shape), dtype=np.float32)
    for channel, out in zip(image, result, strict=True):
        if axis is None:
            out[...] = _zoom(channel, out.shape)
            continue
        slices, out_slices = np.moveaxis(channel, axis, 0), np.moveaxis(out, axis, 0)
        last, zoomed = -1, None
        for out_slice, index in zip(out_slices, nearest_indices(len(slices), len(out_slices)), strict=True):
            if index != last:
                last, zoomed = index, _zoom(slices[index], out_slice.shape)
            out_slice[...] = zoomed
    return result


def resample_label(
    label: NDArray[np.uint8], shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> NDArray[np.uint8]:
    """The class whose linearly interpolated indicator is largest: (D, H, W) uint8 -> shape uint8.

    nnU-Net's order 1 (order 0 across slices). Where several classes meet and none reaches one half, nnU-Net leaves
    background; here the largest wins.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(label))
    classes = torch.unique(tensor)
    winner = resample_argmax([tensor == value for value in classes], shape, spacing, new_spacing)
    return np.asarray(classes[winner.int()].numpy())


def resample_nearest(label: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.uint8]:
    """The nearest voxel: (D, H, W) -> shape."""
    indices = (nearest_indices(old, new) for old, new in zip(label.shape, shape, strict=True))
    return np.ascontiguousarray(label[np.ix_(*indices)])


def resample_argmax(
    volumes: Sequence[torch.Tensor] | torch.Tensor,
    shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> torch.Tensor:
    """Index of the volume (D, H, W) that is largest after linear resampling: -> shape uint8; ties go to the later.

    The volumes are resampled one after another, so that no more than two of them lie in memory at the new size: on
    the grid of a large CT a hundred of them would fit nowhere.
    """
    axis = _slicing_axis(volumes[0].shape, shape, spacing, new_spacing)
    best = _interpolate(volumes[0].float(), shape, axis).clone()
    winner = torch.zeros_like(best, dtype=torch.uint8)
    for index in range(1, len(volumes)):
        value = _interpolate(volumes[index].float(), shape, axis)
        winner[value >= best] = index
        torch.maximum(best, value, out=best)
    return winner


def _slicing_axis(
    old_shape: Sequence[int], shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> int | None:
    """The separate axis, or one that keeps its size: interpolating along that would change nothing."""
    axis = separate_axis(spacing, new_spacing)
    if axis is not None:
        return axis
    return next((axis for axis, (old, new) in enumerate(zip(old_shape, shape, strict=True)) if old == new), None)


def _zoom(array: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    if array.shape == tuple(shape):
        return array
    factors = [new / old for new, old in zip(shape, array.shape, strict=True)]
    zoomed = ndimage.zoom(array, factors, order=3, mode="nearest", grid_mode=True)
    return np.asarray(np.clip(zoomed, array.min(), array.max()))


def _interpolate(volume: torch.Tensor, shape: Sequence[int], axis: int | None) -> torch.Tensor:
    """Linear, half-pixel centres, edges repeated; nearest along `axis`. (D, H, W) -> shape"""
    if tuple(volume.shape) == tuple(shape):
        return volume
    if axis is None:
        return functional.interpolate(volume[None, None], size=tuple(shape), mode="trilinear", align_corners=False)[
            0, 0
        ]
    slices = volume.movedim(axis, 0)  # (slices, rows, columns)
    plane = [size for a, size in enumerate(shape) if a != axis]
    if list(slices.shape[1:]) != plane:
        slices = functional.interpolate(slices[:, None], size=plane, mode="bilinear", align_corners=False)[:, 0]
    indices = torch.from_numpy(nearest_indices(len(slices), shape[axis])).to(volume.device)
    return slices.index_select(0, indices).movedim(0, axis)
