"""The one way from a scan to the network's grid and back, taken by `prepare` and by prediction alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from utnetv2_fast.data.fingerprint import IntensityStatistics, nonzero_box
from utnetv2_fast.data.nifti import Scan
from utnetv2_fast.data.plan import Axes, Normalisation, Plan
from utnetv2_fast.data.resample import resample_argmax, resample_image, resample_label, resample_nearest
from utnetv2_fast.errors import InputError

Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]

# On the network's grid no scan is larger than 2048 x 2048 x 4096 voxels, or a thousand times as large as it is; else
# its spacing or the plan's is wrong. Of a small one, a few voxels inside the crop, four million are no harm.
_MOST_VOXELS = 2**34
_MOST_GROWTH = 1000
_HARMLESS = 2**12


@dataclass(frozen=True)
class Geometry:
    """What leads back: the scan's canonical shape (Z, Y, X), the permutation of its axes to (D, H, W), the crop.

    The crop's (start, stop) and spacing are along (D, H, W).
    """

    scan_shape: Shape
    axes: Axes
    crop: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    cropped_spacing: Spacing

    @property
    def box(self) -> tuple[slice, slice, slice]:
        d, h, w = (slice(*bounds) for bounds in self.crop)
        return d, h, w

    @property
    def cropped_shape(self) -> Shape:
        d, h, w = (stop - start for start, stop in self.crop)
        return d, h, w


def target_spacing(geometry: Geometry, plan: Plan) -> Spacing:
    """The plan's spacing (D, H, W); an axis that the plan leaves alone keeps the scan's."""
    d, h, w = (own if new is None else new for own, new in zip(geometry.cropped_spacing, plan.spacing, strict=True))
    return d, h, w


def target_shape(geometry: Geometry, plan: Plan) -> Shape:
    """The shape (D, H, W) that the cropped scan has at the plan's spacing, at least 1 along every axis."""
    spacings = zip(geometry.cropped_shape, geometry.cropped_spacing, target_spacing(geometry, plan), strict=True)
    d, h, w = (max(1, round(old / new * size)) for size, old, new in spacings)
    return d, h, w


def preprocess_image(
    scan: Scan, plan: Plan, label: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.float32], Geometry]:
    """Permute, crop, normalise, resample, in nnU-Net's order: -> (C, D, H, W) float32, geometry.

    Cropped is to the non-zero box, unless the plan says otherwise. Only a plan that crops by the label looks at `label`
    (Z, Y, X), and without one leaves the scan whole. Raises ValueError when the scan has not the plan's channels, and
    InputError when it would be absurdly large.
    """
    if len(scan.image) != len(plan.channels):
        raise ValueError(f"a scan of {len(scan.image)} channels for a plan of {len(plan.channels)}")
    axes = plan.axes_of(scan.grid.spacing)
    image = scan.image.transpose(0, *(1 + axis for axis in axes))  # (C, D, H, W)
    z, y, x = scan.image.shape[1:]
    depth, height, width = (scan.grid.spacing[axis] for axis in axes)
    if plan.crop == "nonzero":
        d, h, w = nonzero_box(image)
    elif plan.crop == "label" and label is not None:
        d, h, w = _label_box(label.transpose(axes), (depth, height, width), plan)
    else:
        d, h, w = (slice(0, size) for size in image.shape[1:])
    geometry = Geometry(
        scan_shape=(z, y, x),
        axes=axes,
        crop=((d.start, d.stop), (h.start, h.stop), (w.start, w.stop)),
        cropped_spacing=(depth, height, width),
    )
    shape = target_shape(geometry, plan)
    if prod(shape) > min(_MOST_VOXELS, _MOST_GROWTH * max(prod(geometry.cropped_shape), _HARMLESS)):
        raise InputError(
            f"A scan of {z} x {y} x {x} voxels would have {' x '.join(map(str, shape))} at the plan's spacing; correct "
            "the spacing of the scan, or that of the plan."
        )
    image = _normalise(image[:, d, h, w], plan.normalisation, plan.intensities)
    spacing = target_spacing(geometry, plan)
    return resample_image(image, shape, geometry.cropped_spacing, spacing, _separate(plan)), geometry


def preprocess_label(label: NDArray[np.uint8], geometry: Geometry, plan: Plan) -> NDArray[np.uint8]:
    """The label map (Z, Y, X) of a scan on the grid that `preprocess_image` gave its image: (D, H, W) uint8."""
    cropped, shape = label.transpose(geometry.axes)[geometry.box], target_shape(geometry, plan)
    if plan.resampling == "nearest_across":
        return resample_nearest(cropped, shape)
    return resample_label(cropped, shape, geometry.cropped_spacing, target_spacing(geometry, plan))


def restore_label(planes: Iterable[Tensor], geometry: Geometry, plan: Plan) -> NDArray[np.uint8]:
    """Scores on the plan's grid, D planes (K, H, W) -> the label map (Z, Y, X) uint8 on the scan's canonical grid.

    The scores, not their argmax, are resampled (linearly, nearest across thick slices), plane by plane on their
    device, and each plane is looked at only until the next one is asked for. Outside the crop lies background.
    """
    winners = resample_argmax(
        planes,
        target_shape(geometry, plan),
        geometry.cropped_shape,
        target_spacing(geometry, plan),
        geometry.cropped_spacing,
    )
    label = np.zeros(geometry.scan_shape, dtype=np.uint8)
    for out, winner in zip(label.transpose(geometry.axes)[geometry.box], winners, strict=True):
        out[...] = winner.cpu().numpy()
    return label


def _separate(plan: Plan) -> int | None:
    """The axis along which images take the nearest slice whatever the spacings are."""
    return 0 if plan.resampling == "nearest_across" else None


def _label_box(label: NDArray[np.uint8], spacing: Spacing, plan: Plan) -> tuple[slice, slice, slice]:
    """The box of the foreground of `label` (D, H, W) and the plan's context around it, inside the scan.

    The context counts voxels of the plan's grid. A label map without foreground leaves the scan whole.
    """
    assert plan.label_context is not None
    around = []
    box = nonzero_box(label[None])
    for part, size, own, new, context in zip(box, label.shape, spacing, plan.spacing, plan.label_context, strict=True):
        margin = round(context * (own if new is None else new) / own)
        around.append(slice(max(0, part.start - margin), min(size, part.stop + margin)))
    d, h, w = around
    return d, h, w


def _normalise(
    image: NDArray[np.float32], schemes: tuple[Normalisation, ...], statistics: tuple[IntensityStatistics, ...]
) -> NDArray[np.float32]:
    """Per channel: CT by the dataset's clip, mean and deviation; else to zero mean and unit deviation of the scan.

    "percentile_98" instead clips to [0, p98] and divides by p98, the scan's 98th percentile (the authors' code, MR).
    Plane by plane, so that no more than the image and the result are in memory.
    """
    result = np.empty_like(image, order="C")
    inside = None
    if "zscore_nonzero" in schemes:
        inside = ndimage.binary_fill_holes((image != 0).any(axis=0))
    for channel, out, scheme, known in zip(image, result, schemes, statistics, strict=True):
        if scheme == "ct":
            for plane, target in zip(channel, out, strict=True):
                clipped = plane.clip(known.percentile_00_5, known.percentile_99_5)
                target[...] = (clipped - known.mean) / max(known.std, 1e-8)
            continue
        if scheme == "percentile_98":
            highest = max(float(np.percentile(channel, 98)), 1e-8) if channel.size else 1.0
            for plane, target in zip(channel, out, strict=True):
                target[...] = plane.clip(0, highest) / np.float32(highest)
            continue
        mask = inside if scheme == "zscore_nonzero" else None
        mean, std = _mean_and_std(channel, mask)
        for plane, target, part in zip(channel, out, repeat(True) if mask is None else mask, strict=False):
            target[...] = np.where(part, (plane - np.float32(mean)) / np.float32(max(std, 1e-8)), np.float32(0))
    return result


def _mean_and_std(volume: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Of (D, H, W), where `mask` is true; (0, 1) where it is nowhere.

    In float64: float32 loses digits over the 1e8 voxels of a large scan.
    """

    def planes() -> Iterator[NDArray[np.float64]]:
        for index, plane in enumerate(volume):
            yield (plane if mask is None else plane[mask[index]]).astype(np.float64)

    count = volume.size if mask is None else int(np.count_nonzero(mask))
    if not count:
        return 0.0, 1.0
    mean = sum(float(plane.sum()) for plane in planes()) / count
    return mean, (sum(float(np.square(plane - mean).sum()) for plane in planes()) / count) ** 0.5
