"""How scans become network input: axes, spacing and normalisation by nnU-Net's rules, and the patch to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import inf, prod, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, model_validator

from utnetv2_fast.data.dataset import Dataset
from utnetv2_fast.data.fingerprint import Fingerprint, IntensityStatistics
from utnetv2_fast.data.resample import ANISOTROPY_THRESHOLD
from utnetv2_fast.errors import InputError

__all__ = [
    "Axes",
    "Dimensions",
    "IntensityStatistics",
    "IntensityWindow",
    "Normalisation",
    "PatchPlan",
    "Plan",
    "Preparation",
    "make_plan",
    "plan_patch",
    "slice_axis",
]

Dimensions = Literal[2, 3]
Axes = tuple[int, int, int]
Normalisation = Literal["ct", "zscore", "zscore_nonzero", "percentile_98"]
Resampling = Literal["nnunet", "nearest_across"]
Crop = Literal["nonzero", "none", "label"]

NUM_SCALES = 4
# An axis is halved while it has this many voxels (nnU-Net: no feature map below 4).
_SMALLEST_HALVED = 8
# nnU-Net lets an axis take part (in pooling, in the kernel) once its spacing is within a factor of 2 of the finest.
# Half of that, the square root, brings every scale as near to isotropic as halving can; it gives exactly the scales
# and kernels of the paper's 3D networks for ACDC (5.0/1.56 mm), BCV (3.0/0.75 mm) and LiTS (1.0/0.77 mm).
_COMPARABLE_SPACING = sqrt(2)
# nnU-Net starts from a cube of 256^3 voxels where it ends near 128^3, so that the median shape clips it first.
_INITIAL_EXCESS = 8


class IntensityWindow(BaseModel):
    """What CT is clipped to, then centred on and divided by, in HU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    mean: float
    std: PositiveFloat


class Preparation(BaseModel):
    """How scans are made ready, as far as nnU-Net's rules do not decide it: the defaults are those rules."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spacing: tuple[PositiveFloat | None, PositiveFloat, PositiveFloat] | None = Field(
        default=None,
        description="mm along (Z, Y, X), where slices are thick across them first; null where a 2D network leaves "
        "slices as they are",
    )
    normalisation: Literal["nnunet", "percentile_98"] = Field(
        default="nnunet", description="of channels other than CT; percentile_98: clipped to [0, p98], divided by p98"
    )
    window: IntensityWindow | None = Field(default=None, description="of CT; null: of the foreground of all cases")
    resampling: Resampling = Field(
        default="nnunet", description="nearest_across: images by cubic splines in slices, all else by nearest voxels"
    )
    crop: Crop = Field(default="nonzero", description="label: to the box of the reference label map, a leak")
    label_context: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = Field(
        default=None, description="voxels (D, H, W) kept around the box of the labels where crop is label"
    )

    @model_validator(mode="after")
    def _label_crop_has_context(self) -> Preparation:
        if self.crop == "label" and self.label_context is None:
            raise ValueError("crop: label needs label_context")
        return self


class Plan(BaseModel):
    """The way from scans to network input, written once per dataset and dimension, and carried by every run.

    `axes` permutes (Z, Y, X) to (D, H, W), the coarsest axis first; with `slices_first` a scan whose slices lie
    otherwise has axes of its own. `spacing` and `median_shape` (after crop and resampling) are along (D, H, W); in 2D
    slices keep their distance, so `spacing[0]` is None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    dimensions: Dimensions
    labels: dict[str, int]
    channels: tuple[str, ...]
    axes: Axes
    slices_first: bool = False
    spacing: tuple[float | None, float, float]
    median_shape: tuple[int, int, int]
    normalisation: tuple[Normalisation, ...]
    intensities: tuple[IntensityStatistics, ...]
    resampling: Resampling = "nnunet"
    crop: Crop = "nonzero"
    label_context: tuple[int, int, int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    def axes_of(self, spacing: Sequence[float]) -> Axes:
        """The permutation of (Z, Y, X) to (D, H, W) for a scan of this spacing (mm) along (Z, Y, X).

        With `slices_first` the axis across the scan's own slices comes first, where it has thick ones. The two others
        follow in the order Z, Y, X, which shows a heart from one side whichever way its short-axis slices were stored:
        its long axis leads to the left, the front and down at once, and H x W along it, from base to apex, whichever
        of the three directions is nearest. Only quarter turns in the plane remain, and the order of the slices.
        """
        return _own_axes(spacing, self.axes) if self.slices_first else self.axes

    @model_validator(mode="after")
    def _parts_agree(self) -> Plan:
        """Plans come from files too: nothing that follows one asks again."""
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"axes must be a permutation of 0, 1 and 2, got {self.axes}")
        if sorted(self.labels.values()) != list(range(len(self.labels))) or not 2 <= len(self.labels) <= 256:
            raise ValueError("labels must have the values 0 (background), 1, 2, ... without gaps, at most 255")
        if not len(self.channels) == len(self.normalisation) == len(self.intensities) > 0:
            raise ValueError("channels, normalisation and intensities must be equally many, at least one")
        if (self.spacing[0] is None) != (self.dimensions == 2):
            raise ValueError("the first spacing is null in 2D, and only there")
        if not all(mm is None or 0 < mm < inf for mm in self.spacing) or min(self.median_shape) < 1:
            raise ValueError("spacing and median_shape must be positive")
        return self


class PatchPlan(BaseModel):
    """The patch (D, H, W) or (H, W), the factors of the four down-samplings, the kernels of the five levels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patch_size: tuple[int, ...]
    scales: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]


_BY_RULE = Preparation()


def make_plan(
    dataset: Dataset, fingerprint: Fingerprint, dimensions: Dimensions, preparation: Preparation = _BY_RULE
) -> Plan:
    """nnU-Net's plan (ExperimentPlanner) with what `preparation` decides otherwise.

    Where slices are thick, every scan is measured along axes of its own. Raises InputError when the given spacing
    leaves Z open for a 3D network.
    """
    spacings = np.array([case.spacing for case in fingerprint.cases.values()])
    shapes = np.array([case.shape for case in fingerprint.cases.values()])
    axes = _axes_of_slices(spacings, dimensions)
    if axes is not None:
        orders = np.array([_own_axes(spacing, axes) for spacing in spacings.tolist()])
        spacings, shapes = (np.take_along_axis(values, orders, axis=1) for values in (spacings, shapes))
    target = _target_spacing(spacings, shapes)
    if preparation.spacing is not None:
        z, y, x = preparation.spacing
        if z is None and dimensions == 3:
            raise InputError(f"The spacing [null, {y:g}, {x:g}] is for 2D networks; give it along Z for a 3D one.")
        target = np.array([np.inf if z is None else z, y, x])
        if axes is not None:
            target = target[list(_leading(int(np.argmax(target))))]
    order = _leading(int(np.argmax(target))) if axes is None else (0, 1, 2)
    target, spacings, shapes = target[list(order)], spacings[:, order], shapes[:, order]
    spacing = target.tolist()
    new_shapes = np.rint(spacings / target * shapes)
    if dimensions == 2:
        new_shapes[:, 0] = shapes[:, 0]
    cropped_much = np.median([case.relative_size for case in fingerprint.cases.values()]) < 3 / 4
    d, h, w = (max(1, round(size)) for size in np.median(new_shapes, axis=0).tolist())
    by_rule: Normalisation = "zscore_nonzero" if cropped_much else "zscore"
    otherwise = by_rule if preparation.normalisation == "nnunet" else preparation.normalisation
    normalisation: list[Normalisation] = [
        "ct" if channel.lower() == "ct" else otherwise for channel in dataset.channels
    ]
    return Plan(
        dataset=dataset.name,
        dimensions=dimensions,
        labels=dataset.labels,
        channels=dataset.channels,
        axes=order if axes is None else axes,
        slices_first=axes is not None,
        spacing=(None if dimensions == 2 else spacing[0], spacing[1], spacing[2]),
        median_shape=(d, h, w),
        normalisation=tuple(normalisation),
        intensities=tuple(
            _windowed(known, preparation.window) if kind == "ct" else known
            for known, kind in zip(fingerprint.intensities, normalisation, strict=True)
        ),
        resampling=preparation.resampling,
        crop=preparation.crop,
        label_context=preparation.label_context if preparation.crop == "label" else None,
    )


def _windowed(known: IntensityStatistics, window: IntensityWindow | None) -> IntensityStatistics:
    """The statistics that CT is normalised by: those of `window`, if there is one."""
    if window is None:
        return known
    given = {"percentile_00_5": window.low, "percentile_99_5": window.high, "mean": window.mean, "std": window.std}
    return known.model_copy(update=given)


def plan_patch(plan: Plan, input_size: tuple[int, ...]) -> PatchPlan:
    """The largest patch of the data's proportions whose volume is at most that of `input_size`, and its scales.

    nnU-Net's search: begin with a physical cube clipped to the median shape, give every axis a multiple of its total
    stride, and shorten the axis that covers most of the median shape until the volume fits.
    """
    if len(input_size) != plan.dimensions:
        raise ValueError(f"input_size {input_size} for a {plan.dimensions}D plan")
    spacing = np.array(plan.spacing[-len(input_size) :], dtype=np.float64)
    median = np.array(plan.median_shape[-len(input_size) :])
    edge = (_INITIAL_EXCESS * prod(input_size) * spacing.prod()) ** (1 / len(spacing))  # mm
    patch = np.maximum(1, np.minimum(np.rint(edge / spacing), median)).astype(int)
    while True:
        scales, kernels = _pyramid(patch, spacing)
        stride = np.prod(scales, axis=0)
        padded = -(-patch // stride) * stride
        shortenable = padded > stride
        if padded.prod() <= prod(input_size) or not shortenable.any():
            return PatchPlan(
                patch_size=tuple(padded.tolist()),
                scales=tuple(tuple(scale) for scale in scales),
                kernel_sizes=tuple(tuple(kernel) for kernel in kernels),
            )
        axis = int(np.argmax(np.where(shortenable, padded / median, -1)))
        patch = padded
        patch[axis] -= stride[axis]


def slice_axis(spacing: Sequence[float]) -> int | None:
    """The axis across a scan's slices: the one that is clearly coarser than both others, None where there is none."""
    *_, second, coarsest = sorted(spacing)
    return list(spacing).index(coarsest) if coarsest > _COMPARABLE_SPACING * second else None


def _axes_of_slices(spacings: NDArray[np.float64], dimensions: Dimensions) -> Axes | None:
    """The axes (D, H, W) of most scans, if slices decide them: for 2D networks, and where most scans have thick ones.

    spacings (N, 3) along (Z, Y, X); None where all scans keep the same axes.
    """
    second, coarsest = np.sort(spacings, axis=1)[:, 1:].T
    clearly = _COMPARABLE_SPACING if dimensions == 2 else ANISOTROPY_THRESHOLD
    if np.median(coarsest / second) <= clearly:
        return None
    found = Counter(slice_axis(spacing) for spacing in spacings.tolist())
    return _leading(max((axis for axis in found if axis is not None), key=lambda axis: (found[axis], -axis)))


def _own_axes(spacing: Sequence[float], usual: Axes) -> Axes:
    """Those of a scan with this spacing (Z, Y, X) among others whose axes are `usual`."""
    axis = slice_axis(spacing)
    return usual if axis in (None, usual[0]) else _leading(axis)


def _leading(axis: int) -> Axes:
    """`axis` first, the others in their order."""
    second, third = (other for other in range(3) if other != axis)
    return axis, second, third


def _target_spacing(spacings: NDArray[np.float64], shapes: NDArray[np.intp]) -> NDArray[np.float64]:
    """The median per axis; where slices are thick and few, their 10th percentile instead (nnU-Net)."""
    target, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = np.delete(np.arange(3), worst)
    thick = target[worst] > ANISOTROPY_THRESHOLD * target[others].max()
    few = size[worst] * ANISOTROPY_THRESHOLD < size[others].min()
    if thick and few:
        target[worst] = np.percentile(spacings[:, worst], 10)
        # The axis stays the coarsest.
        if target[worst] < target[others].max():
            target[worst] = target[others].max() + 1e-5
    return target


def _pyramid(patch: NDArray[np.intp], spacing: NDArray[np.float64]) -> tuple[list[list[int]], list[list[int]]]:
    """Down-sampling factors of the four scales and kernel sizes of the five levels."""
    size, spacing = patch.copy(), spacing.copy()
    kernel = np.ones_like(patch)
    scales, kernels = [], []
    for _ in range(NUM_SCALES):
        kernel = np.where(spacing <= _COMPARABLE_SPACING * spacing.min(), 3, kernel)
        halvable = size >= _SMALLEST_HALVED
        finest = spacing.min(where=halvable, initial=np.inf)
        factor = np.where(halvable & (spacing <= _COMPARABLE_SPACING * finest), 2, 1)
        kernels.append(kernel.tolist())
        scales.append(factor.tolist())
        spacing *= factor
        size = -(-size // factor)
    return scales, [*kernels, [3] * len(size)]
