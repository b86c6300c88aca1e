"""The one way from a scan to the network's grid and back, taken by `prepare` and by prediction alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from utnetv2_fast.data.fingerprint import IntensityStatistics, nonzero_box
from utnetv2_fast.data.nifti import Scan
from utnetv2_fast.data.plan import Normalisation, Plan
from utnetv2_fast.data.resample import resample_argmax, resample_image, resample_label, resample_nearest

Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """What leads back: the scan's canonical shape (Z, Y, X), the crop's (start, stop) and spacing along (D, H, W)."""

    scan_shape: Shape
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
    (Z, Y, X), and without one leaves the scan whole. Raises ValueError when the scan has not the plan's channels.
    """
    if len(scan.image) != len(plan.channels):
        raise ValueError(f"a scan of {len(scan.image)} channels for a plan of {len(plan.channels)}")
    image = scan.image.transpose(0, *(1 + axis for axis in plan.axes))  # (C, D, H, W)
    z, y, x = scan.image.shape[1:]
    depth, height, width = (scan.grid.spacing[axis] for axis in plan.axes)
    if plan.crop == "nonzero":
        d, h, w = nonzero_box(image)
    elif plan.crop == "label" and label is not None:
        d, h, w = _label_box(label.transpose(plan.axes), (depth, height, width), plan)
    else:
        d, h, w = (slice(0, size) for size in image.shape[1:])
    geometry = Geometry(
        scan_shape=(z, y, x),
        crop=((d.start, d.stop), (h.start, h.stop), (w.start, w.stop)),
        cropped_spacing=(depth, height, width),
    )
    image = _normalise(image[:, d, h, w], plan.normalisation, plan.intensities)
    shape, spacing = target_shape(geometry, plan), target_spacing(geometry, plan)
    return resample_image(image, shape, geometry.cropped_spacing, spacing, _separate(plan)), geometry


def preprocess_label(label: NDArray[np.uint8], geometry: Geometry, plan: Plan) -> NDArray[np.uint8]:
    """The label map (Z, Y, X) of a scan on the grid that `preprocess_image` gave its image: (D, H, W) uint8."""
    cropped, shape = label.transpose(plan.axes)[geometry.box], target_shape(geometry, plan)
    if plan.resampling == "nearest_across":
        return resample_nearest(cropped, shape)
    return resample_label(cropped, shape, geometry.cropped_spacing, target_spacing(geometry, plan))


def restore_label(probabilities: torch.Tensor, geometry: Geometry, plan: Plan) -> NDArray[np.uint8]:
    """Scores (K, D, H, W) on the plan's grid -> the label map (Z, Y, X) uint8 on the scan's canonical grid.

    The scores, not their argmax, are resampled (linearly, nearest across thick slices); outside the crop lies
    background. Computed on the device of `probabilities`.
    """
    cropped = resample_argmax(
        probabilities, geometry.cropped_shape, target_spacing(geometry, plan), geometry.cropped_spacing
    )
    label = np.zeros(geometry.scan_shape, dtype=np.uint8)
    label.transpose(plan.axes)[geometry.box] = cropped.cpu().numpy()
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
    """
    result = np.empty_like(image, order="C")
    inside = None
    if "zscore_nonzero" in schemes:
        inside = ndimage.binary_fill_holes((image != 0).any(axis=0))
    for channel, out, scheme, known in zip(image, result, schemes, statistics, strict=True):
        if scheme == "ct":
            out[...] = (channel.clip(known.percentile_00_5, known.percentile_99_5) - known.mean) / max(known.std, 1e-8)
        elif scheme == "zscore":
            out[...] = _standardised(channel)
        elif scheme == "percentile_98":
            highest = max(float(np.percentile(channel, 98)), 1e-8) if channel.size else 1.0
            out[...] = channel.clip(0, highest) / np.float32(highest)
        else:
            out[...] = 0
            out[inside] = _standardised(channel[inside])
    return result


def _standardised(values: NDArray[np.float32]) -> NDArray[np.float32]:
    # float64 sums: float32 loses digits over the 1e8 voxels of a large scan.
    mean, std = (values.mean(dtype=np.float64), values.std(dtype=np.float64)) if values.size else (0.0, 1.0)
    return ((values - np.float32(mean)) / np.float32(max(std, 1e-8))).astype(np.float32)
