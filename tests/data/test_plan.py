"""Plans follow nnU-Net's rules; patches have the data's proportions and the paper's scales."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from utnetv2_fast.data.dataset import Dataset
from utnetv2_fast.data.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from utnetv2_fast.data.plan import IntensityWindow, Plan, Preparation, make_plan, plan_patch
from utnetv2_fast.errors import InputError

STATISTICS = IntensityStatistics(mean=1, std=2, median=1, minimum=0, maximum=9, percentile_00_5=0.1, percentile_99_5=8)
ALL = (2, 2, 2)
FLAT = (1, 2, 2)


def plan_of(
    spacings: Sequence[tuple[float, float, float]],
    shapes: Sequence[tuple[int, int, int]],
    dimensions: int = 3,
    channels: tuple[str, ...] = ("MRI",),
    relative_size: float = 1.0,
    preparation: Preparation | None = None,
) -> Plan:
    cases = {
        f"{index}": CaseFingerprint(shape=shape, spacing=spacing, relative_size=relative_size)
        for index, (spacing, shape) in enumerate(zip(spacings, shapes, strict=True))
    }
    fingerprint = Fingerprint(cases=cases, intensities=(STATISTICS,) * len(channels))
    dataset = Dataset(Path("x"), "x", channels, {"background": 0, "a": 1}, ())
    return make_plan(dataset, fingerprint, dimensions, preparation or Preparation())


def test_isotropic_data_keep_their_axes_and_median_spacing() -> None:
    plan = plan_of([(1, 1, 1), (2, 2, 2), (1.5, 1.5, 1.5)], [(30, 40, 50)] * 3)
    assert plan.axes == (0, 1, 2)
    assert plan.spacing == (1.5, 1.5, 1.5)
    assert plan.median_shape == (30, 40, 50)
    assert plan.num_classes == 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_coarsest_axis_comes_first(axis: int) -> None:
    def turned(values: tuple) -> tuple:
        return tuple(np.insert(values[1:], axis, values[0]).tolist())

    plan = plan_of([turned((2.0, 1.0, 1.0))] * 2, [turned((20, 30, 40))] * 2)
    assert plan.axes[0] == axis
    assert plan.axes[1:] == tuple(sorted(plan.axes[1:]))
    assert plan.spacing == (2, 1, 1)
    assert plan.median_shape == (20, 30, 40)


def test_thick_and_few_slices_take_the_tenth_percentile() -> None:
    depths = [5.0, 5.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    plan = plan_of([(z, 1.5, 1.5) for z in depths], [(10, 200, 220)] * 11)
    assert plan.spacing == (5.0, 1.5, 1.5)
    assert plan.median_shape == (20, 200, 220)
    # Thick, but not few: the median stays.
    assert plan_of([(z, 1.5, 1.5) for z in depths], [(100, 200, 220)] * 11).spacing[0] == 10
    # Few, but not thick enough.
    assert plan_of([(z, 3.4, 3.4) for z in depths], [(10, 200, 220)] * 11).spacing[0] == 10


def test_the_tenth_percentile_does_not_get_finer_than_the_plane() -> None:
    plan = plan_of([(z, 1.0, 1.5) for z in [0.5, 0.5, *[10.0] * 8]], [(10, 200, 220)] * 10)
    assert plan.spacing == pytest.approx((1.5, 1.0, 1.5), abs=1e-4)
    assert plan.axes == (0, 1, 2)


def test_two_dimensions_leave_the_slices_alone() -> None:
    plan = plan_of([(5.0, 1, 1), (10.0, 2, 2), (10.0, 1, 1)], [(20, 100, 100), (8, 60, 60), (10, 80, 80)], dimensions=2)
    assert plan.spacing == (None, 1, 1)
    assert plan.median_shape == (10, 100, 100)


def test_normalisation() -> None:
    channels = ("CT", "ct", "T1", "CTA")
    arguments = [(1.0, 1.0, 1.0)], [(30, 30, 30)]
    assert plan_of(*arguments, channels=channels).normalisation == ("ct", "ct", "zscore", "zscore")
    cropped = plan_of(*arguments, channels=channels, relative_size=0.74)
    assert cropped.normalisation == ("ct", "ct", "zscore_nonzero", "zscore_nonzero")
    assert plan_of(*arguments, channels=("T1",), relative_size=0.75).normalisation == ("zscore",)


def test_plans_survive_their_file() -> None:
    plan = plan_of([(5.0, 1, 1)], [(20, 100, 100)], dimensions=2)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def patch(spacing: tuple, median_shape: tuple, input_size: tuple) -> tuple:
    base = plan_of([(1.0, 1.0, 1.0)], [(30, 30, 30)], dimensions=len(input_size))
    found = plan_patch(base.model_copy(update={"spacing": spacing, "median_shape": median_shape}), input_size)
    return found.patch_size, found.scales, found.kernel_sizes


def test_patch_of_small_isotropic_scans() -> None:
    size, scales, kernels = patch((1, 1, 1), (36, 50, 35), (48, 48, 48))
    assert size == (40, 56, 40)
    assert scales == (ALL, ALL, ALL, (1, 1, 1))
    assert kernels == ((3, 3, 3),) * 5


@pytest.mark.parametrize(
    ("name", "spacing", "median_shape", "input_size", "scales", "kernels"),
    [
        ("ACDC", (5.0, 1.5625, 1.5625), (18, 237, 208), (16, 192, 192), (FLAT, FLAT, ALL, ALL), (1, 1, 3, 3, 3)),
        ("BCV", (3.0, 0.76, 0.76), (148, 512, 512), (32, 128, 128), (FLAT, FLAT, ALL, ALL), (1, 1, 3, 3, 3)),
        ("LiTS", (1.0, 0.7676, 0.7676), (482, 512, 512), (128, 128, 128), (ALL, ALL, ALL, ALL), (3, 3, 3, 3, 3)),
    ],
)
def test_scales_and_kernels_are_those_of_the_paper(
    name: str, spacing: tuple, median_shape: tuple, input_size: tuple, scales: tuple, kernels: tuple
) -> None:
    size, found, found_kernels = patch(spacing, median_shape, input_size)
    assert found == scales
    assert found_kernels == tuple((depth, 3, 3) for depth in kernels)
    assert 0.8 * prod(input_size) <= prod(size) <= prod(input_size)


def test_thin_volumes_are_halved_along_depth_as_long_as_they_can_be() -> None:
    size, scales, _ = patch((5.0, 1.5, 1.5), (10, 240, 220), (16, 192, 192))
    assert scales == (FLAT, FLAT, ALL, FLAT)
    assert size[0] == 10


def test_patch_in_two_dimensions() -> None:
    size, scales, kernels = patch((None, 1.56, 1.56), (9, 246, 213), (256, 256))
    assert size == (256, 224)
    assert scales == ((2, 2),) * 4
    assert kernels == ((3, 3),) * 5
    # Pixels three times wider than high.
    assert patch((None, 1.0, 3.0), (9, 300, 100), (256, 256))[1][:2] == ((2, 1), (2, 1))


@settings(max_examples=200, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(0.2, 12)] * 3),
    median=st.tuples(*[st.integers(1, 600)] * 3),
    edge=st.integers(16, 160),
    dimensions=st.sampled_from([2, 3]),
)
def test_patches_fit_their_budget_and_their_strides(spacing: tuple, median: tuple, edge: int, dimensions: int) -> None:
    size, scales, kernels = patch((None, *spacing[1:]) if dimensions == 2 else spacing, median, (edge,) * dimensions)
    assert len(size) == dimensions
    assert len(scales) == 4
    assert len(kernels) == 5
    stride = np.prod(scales, axis=0)
    assert not (np.array(size) % stride).any()
    assert prod(size) <= edge**dimensions or (np.array(size) <= stride).all()
    assert (np.array(size) < np.array(median[-dimensions:]) + stride).all()
    assert {factor for scale in scales for factor in scale} <= {1, 2}
    # No feature map gets thinner than four voxels by halving.
    assert all(s // t >= 4 or t == 1 for s, t in zip(size, stride, strict=True))
    for before, after in pairwise(kernels):
        assert all(a >= b for b, a in zip(before, after, strict=True))


def test_input_size_of_another_dimension() -> None:
    with pytest.raises(ValueError, match="3D plan"):
        plan_patch(plan_of([(1.0, 1.0, 1.0)], [(30, 30, 30)]), (64, 64))


def test_a_given_spacing_decides_the_axes_too() -> None:
    """Unless slices do: its coarsest number, or the one that is left open, is then the one across them."""
    spacings, shapes = [(1.0, 3.0, 1.5)] * 2, [(40, 30, 50)] * 2
    assert plan_of(spacings, shapes).axes == (1, 0, 2)
    three = plan_of(spacings, shapes, preparation=Preparation(spacing=(5.0, 1.5, 1.5)))
    assert (three.axes, three.spacing, three.median_shape) == ((0, 1, 2), (5.0, 1.5, 1.5), (8, 60, 50))
    turned = plan_of(spacings, shapes, preparation=Preparation(spacing=(1.0, 4.0, 2.0)))
    assert (turned.axes, turned.spacing) == ((1, 0, 2), (4.0, 1.0, 2.0))
    two = plan_of(spacings, shapes, 2, preparation=Preparation(spacing=(None, 1.5, 0.75)))
    assert (two.axes, two.spacing, two.median_shape) == ((1, 0, 2), (None, 1.5, 0.75), (30, 27, 100))
    with pytest.raises(InputError, match=r"\[null, 1.5, 1.5\] is for 2D"):
        plan_of(spacings, shapes, 3, preparation=Preparation(spacing=(None, 1.5, 1.5)))


def test_given_intensities_hold_for_ct_alone_and_given_normalisation_for_the_others() -> None:
    window = IntensityWindow(low=-17, high=201, mean=99.4, std=39.4)
    preparation = Preparation(window=window, normalisation="percentile_98")
    plan = plan_of([(1, 1, 1)], [(30, 30, 30)], channels=("CT", "T1"), preparation=preparation)
    assert plan.normalisation == ("ct", "percentile_98")
    ct, t1 = plan.intensities
    assert (ct.percentile_00_5, ct.percentile_99_5, ct.mean, ct.std) == (-17, 201, 99.4, 39.4)
    assert t1 == STATISTICS
    assert plan_of([(1, 1, 1)], [(30, 30, 30)], channels=("CT", "T1")).intensities == (STATISTICS, STATISTICS)


def test_the_context_of_a_label_crop_is_in_force_only_with_it() -> None:
    given = Preparation(label_context=(5, 20, 20))
    assert plan_of([(1, 1, 1)], [(30, 30, 30)], preparation=given).label_context is None
    cropping = Preparation(crop="label", label_context=(5, 20, 20))
    assert plan_of([(1, 1, 1)], [(30, 30, 30)], preparation=cropping).label_context == (5, 20, 20)
    with pytest.raises(ValidationError, match="needs label_context"):
        Preparation(crop="label")


FEW_SLICES = [(9.0, 1.4, 1.5), (8.0, 1.4, 1.5), (10.0, 1.4, 1.5), (9.0, 1.4, 1.5)]


def turned(values: tuple, axis: int) -> tuple:
    """(D, H, W) as (Z, Y, X) of a scan whose slices lie across `axis`, the others in their order."""
    return tuple(np.insert(values[1:], axis, values[0]).tolist())


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("ways", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (1, 0, 2, 1), (0, 1, 2, 2)])
def test_thick_slices_are_measured_whichever_way_they_lie(dimensions: int, ways: tuple) -> None:
    spacings = [turned(spacing, way) for spacing, way in zip(FEW_SLICES, ways, strict=True)]
    plan = plan_of(spacings, [turned((10, 200, 180), way) for way in ways], dimensions)
    alike = plan_of(FEW_SLICES, [(10, 200, 180)] * 4, dimensions)
    assert plan.slices_first
    assert plan.model_copy(update={"axes": alike.axes}) == alike
    assert plan.axes == {0: (0, 1, 2), 1: (1, 0, 2), 2: (2, 0, 1)}[max(sorted(ways), key=ways.count)]
    for spacing, way in zip(spacings, ways, strict=True):
        assert plan.axes_of(spacing) == {0: (0, 1, 2), 1: (1, 0, 2), 2: (2, 0, 1)}[way]
    given = plan_of(spacings, [(10, 10, 10)] * 4, dimensions, preparation=Preparation(spacing=(5.0, 1.25, 1.5)))
    assert given.spacing[1:] == (1.25, 1.5)
    assert given.spacing[0] == (None if dimensions == 2 else 5.0)


def test_axes_are_the_plans_where_no_slices_stand_out() -> None:
    thick = plan_of(FEW_SLICES, [(10, 200, 180)] * 4)
    for spacing in ((1.0, 1.0, 1.0), (0.7, 0.8, 0.8), (1.0, 1.4, 1.0), (1.0, 2.0, 2.0), (9.0, 1.0, 1.0)):
        assert thick.axes_of(spacing) == (0, 1, 2)
    # Of data without slices, and of the plan in a run from before scans had axes of their own.
    even = plan_of([(1.0, 1.0, 1.2), (1.0, 1.0, 1.2), (1.0, 5.0, 1.0)], [(30, 40, 50)] * 3)
    older = Plan.model_validate(thick.model_dump(exclude={"slices_first"}))
    assert even.axes_of((1.0, 5.0, 1.0)) == even.axes == (2, 0, 1)
    assert older.axes_of((1.0, 5.0, 1.0)) == (0, 1, 2)
    assert not plan_of([(1.0, 1.0, 1.2)], [(30, 40, 50)], 2).slices_first
    assert not plan_of([(2.5, 1.0, 1.0)], [(30, 40, 50)], 3).slices_first
