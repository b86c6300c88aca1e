"""To the network's grid and back: nnU-Net's numbers on the way there, the scan's own voxels on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from utnetv2_fast.data.fingerprint import IntensityStatistics
from utnetv2_fast.data.nifti import Grid, Scan, label_to_native, read_label, read_scan, scan_from_array
from utnetv2_fast.data.plan import Plan
from utnetv2_fast.data.preprocess import preprocess_image, preprocess_label, restore_label, target_shape
from utnetv2_fast.data.resample import resample_image

STATISTICS = IntensityStatistics(
    mean=40, std=20, median=40, minimum=-500, maximum=900, percentile_00_5=-30, percentile_99_5=150
)


def make_plan(**changes: object) -> Plan:
    values = {
        "dataset": "x",
        "dimensions": 3,
        "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
        "channels": ("MRI",),
        "axes": (0, 1, 2),
        "spacing": (1.0, 1.0, 1.0),
        "median_shape": (30, 30, 30),
        "normalisation": ("zscore",),
        "intensities": (STATISTICS,),
    }
    return Plan(**values | changes)


def framed(shape: Sequence[int], spacing: Sequence[float] = (1.0, 1.0, 1.0), seed: int = 0) -> Scan:
    """A scan (Z, Y, X) of noise in a frame of zeros."""
    image = np.zeros((1, *shape), np.float32)
    inner = tuple(slice(size // 4, size - size // 5) for size in shape)
    image[0][inner] = np.random.default_rng(seed).normal(50, 20, image[0][inner].shape)
    return Scan(image, Grid(tuple(shape[::-1]), np.diag([*spacing[::-1], 1.0])))


def one_hot(label: np.ndarray, classes: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(label).long(), classes).movedim(-1, 0).float()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    axes=st.permutations(range(3)),
    dimensions=st.sampled_from([2, 3]),
    seed=st.integers(0, 99),
)
def test_at_the_plans_own_spacing_labels_come_back_exactly(
    shape: tuple, axes: list, dimensions: int, seed: int
) -> None:
    scan = framed(shape, (1.5, 2.5, 3.5), seed)
    spacing = [(1.5, 2.5, 3.5)[axis] for axis in axes]
    plan = make_plan(axes=axes, dimensions=dimensions, spacing=[None if dimensions == 2 else spacing[0], *spacing[1:]])
    image, geometry = preprocess_image(scan, plan)
    label = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    label[scan.image[0] == 0] = 0
    prepared = preprocess_label(label, geometry, plan)
    assert image.shape == (1, *prepared.shape)
    np.testing.assert_array_equal(restore_label(one_hot(prepared).unbind(1), geometry, plan), label)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("own", [(1.0, 1.0, 1.0), (5.0, 0.8, 0.9), (0.7, 0.7, 6.0)])
def test_labels_come_back_from_another_spacing(own: tuple, axes: tuple, dimensions: int) -> None:
    scan = framed((40, 48, 60), own)
    z, y, x = np.indices((40, 48, 60))
    label = np.zeros((40, 48, 60), np.uint8)
    for value, (cz, cy, cx) in ((1, (20.3, 24.2, 22.4)), (2, (21.4, 25.7, 39.2))):
        label[((z - cz) / 9) ** 2 + ((y - cy) / 10) ** 2 + ((x - cx) / 8) ** 2 < 1] = value
    spacing = tuple(1.2 * own[axis] for axis in axes)
    plan = make_plan(axes=axes, dimensions=dimensions, spacing=(None if dimensions == 2 else spacing[0], *spacing[1:]))
    image, geometry = preprocess_image(scan, plan)
    prepared = preprocess_label(label, geometry, plan)
    assert image.shape[1:] == prepared.shape == target_shape(geometry, plan)
    if dimensions == 2:
        assert prepared.shape[0] == geometry.cropped_shape[0]
    back = restore_label(one_hot(prepared).unbind(1), geometry, plan)
    for value in (1, 2):
        overlap = 2 * ((back == value) & (label == value)).sum() / ((back == value).sum() + (label == value).sum())
        assert overlap > 0.9
        # A shift of half a voxel, the usual mistake, would show.
        centres = ndimage.center_of_mass(back == value), ndimage.center_of_mass(label == value)
        np.testing.assert_allclose(*centres, atol=0.25)


def test_the_order_of_the_steps() -> None:
    """Permute, crop, normalise, resample."""
    scan = framed((10, 16, 20), (4.0, 1.0, 1.0))
    plan = make_plan(spacing=(4.0, 1.5, 1.5))
    image, geometry = preprocess_image(scan, plan)
    assert geometry.crop == ((2, 8), (4, 13), (5, 16))
    assert geometry.scan_shape == (10, 16, 20)
    cropped = scan.image[:, 2:8, 4:13, 5:16].astype(np.float64)
    normalised = (cropped - cropped.mean()) / cropped.std()
    expected = resample_image(normalised.astype(np.float32), (6, 6, 7), (4.0, 1.0, 1.0), (4.0, 1.5, 1.5))
    np.testing.assert_allclose(image, expected, atol=1e-5)


def test_normalisation_by_channel() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(60, 80, (3, 8, 9, 10)).astype(np.float32)
    image[:, :4, :, :3] = 0
    image[:, 5, 5, 5] = 0  # a hole: inside all the same
    scan = Scan(image, Grid((10, 9, 8), np.eye(4)))
    plan = make_plan(
        channels=("CT", "T1", "T2"), normalisation=("ct", "zscore", "zscore_nonzero"), intensities=(STATISTICS,) * 3
    )
    result, _ = preprocess_image(scan, plan)
    wide = image.astype(np.float64)
    np.testing.assert_allclose(result[0], (wide[0].clip(-30, 150) - 40) / 20, atol=1e-5)
    np.testing.assert_allclose(result[1], (wide[1] - wide[1].mean()) / wide[1].std(), atol=1e-5)
    inside = (image != 0).any(0)
    inside[5, 5, 5] = True
    values = wide[2][inside]
    np.testing.assert_allclose(result[2][inside], (values - values.mean()) / values.std(), atol=1e-5)
    assert not result[2][~inside].any()


def test_many_voxels_lose_no_digits() -> None:
    image = np.zeros((1, 150, 150, 150), np.float32)
    image[:, 2:-2, 2:-2, 2:-2] = np.random.default_rng(0).normal(1000, 1, (146, 146, 146))
    result, _ = preprocess_image(Scan(image, Grid((150, 150, 150), np.eye(4))), make_plan())
    assert abs(result.mean(dtype=np.float64)) < 1e-4
    assert result.std(dtype=np.float64) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_scan_gives_zeros(value: float) -> None:
    scan = Scan(np.full((1, 3, 4, 5), value, np.float32), Grid((5, 4, 3), np.eye(4)))
    for scheme in ("zscore", "zscore_nonzero"):
        image, geometry = preprocess_image(scan, make_plan(normalisation=(scheme,)))
        assert not image.any()
        assert restore_label(torch.zeros(4, *image.shape[1:]).unbind(1), geometry, make_plan()).shape == (3, 4, 5)


def test_nothing_vanishes_at_a_coarse_spacing() -> None:
    image, geometry = preprocess_image(framed((4, 5, 30), (0.1, 0.1, 1.0)), make_plan(axes=(2, 0, 1)))
    assert image.shape[2:] == (1, 1)
    assert restore_label(
        one_hot(np.ones(image.shape[1:], np.uint8)).unbind(1), geometry, make_plan(axes=(2, 0, 1))
    ).any()


def test_the_scan_is_left_as_it_was() -> None:
    scan = framed((10, 16, 20))
    before = scan.image.copy()
    preprocess_image(scan, make_plan(normalisation=("zscore_nonzero",)))
    np.testing.assert_array_equal(scan.image, before)


def test_other_channels_than_planned() -> None:
    with pytest.raises(ValueError, match="1 channels for a plan of 2"):
        preprocess_image(
            framed((4, 4, 4)),
            make_plan(channels=("a", "b"), normalisation=("zscore",) * 2, intensities=(STATISTICS,) * 2),
        )


@settings(max_examples=30, deadline=None)
@given(permutation=st.permutations(range(3)), flips=st.tuples(*[st.sampled_from((1, -1))] * 3), seed=st.integers(0, 99))
def test_however_it_is_stored_a_scan_gives_the_same_input_and_a_label_its_own_voxels(
    permutation: list, flips: tuple, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.normal(50, 20, (9, 8, 7)).astype(np.float32)
    affine = np.array([[1.0, 0.1, 0, 5], [-0.1, 1.2, 0, -3], [0, 0, 2.5, 8], [0, 0, 0, 1]])
    plan = make_plan(spacing=(2.5, 1.5, 1.5))
    base = scan_from_array(image, affine)
    expected, geometry = preprocess_image(base, plan)
    scores = torch.from_numpy(rng.random((4, *expected.shape[1:])))

    stored = nib.Nifti1Image(image, affine).as_reoriented(np.column_stack([permutation, flips]))
    turned = scan_from_array(np.asarray(stored.dataobj), stored.affine)
    found, turned_geometry = preprocess_image(turned, plan)
    # Oblique axes turned over have spacings equal to the last bit or so.
    np.testing.assert_allclose(found, expected, atol=1e-5)
    native = label_to_native(restore_label(scores.unbind(1), turned_geometry, plan), turned.grid)
    first = nib.Nifti1Image(label_to_native(restore_label(scores.unbind(1), geometry, plan), base.grid), affine)
    same = first.as_reoriented(np.column_stack([permutation, flips]))
    np.testing.assert_array_equal(native, np.asarray(same.dataobj))


def test_real_scans_come_back(shared_data: Path) -> None:
    folder = shared_data / "acdc/training/patient001"
    scan = read_scan([folder / "patient001_frame01.nii.gz"])
    label, grid = read_label(folder / "patient001_frame01_gt.nii.gz")
    for dimensions, spacing in ((2, (None, 1.3, 1.3)), (3, (5.0, 1.3, 1.3))):
        plan = make_plan(dimensions=dimensions, spacing=spacing)
        _, geometry = preprocess_image(scan, plan)
        back = restore_label(one_hot(preprocess_label(label, geometry, plan)).unbind(1), geometry, plan)
        assert back.shape == grid.canonical_shape
        for value in (1, 2, 3):
            overlap = 2 * ((back == value) & (label == value)).sum() / ((back == value).sum() + (label == value).sum())
            assert overlap > 0.97


def test_intensities_by_the_98th_percentile() -> None:
    values = np.linspace(-50, 350, 1000, dtype=np.float32).reshape(1, 10, 10, 10)
    scan = Scan(values, Grid((10, 10, 10), np.eye(4)))
    image, _ = preprocess_image(scan, make_plan(normalisation=("percentile_98",)))
    highest = np.percentile(values, 98)
    np.testing.assert_allclose(image, np.clip(values, 0, highest) / highest, atol=1e-6)
    dark = Scan(np.full((1, 3, 3, 3), -1, np.float32), scan.grid)
    assert not preprocess_image(dark, make_plan(normalisation=("percentile_98",)))[0].any()


def test_nearest_slices_and_labels_whatever_the_spacing() -> None:
    """Isotropic voxels, which nnU-Net would interpolate along every axis."""
    rng = np.random.default_rng(0)
    scan = Scan(rng.normal(size=(1, 6, 10, 12)).astype(np.float32), Grid((12, 10, 6), np.eye(4)))
    label = rng.integers(0, 4, (6, 10, 12)).astype(np.uint8)
    plan = make_plan(spacing=(0.5, 0.8, 0.8), resampling="nearest_across")
    image, geometry = preprocess_image(scan, plan)
    assert image.shape == (1, 12, 12, 15)
    np.testing.assert_array_equal(image[0, ::2], image[0, 1::2])  # each slice twice
    own = ((scan.image - scan.image.mean()) / scan.image.std())[0, 3]
    alone = ndimage.zoom(own, (12 / 10, 15 / 12), order=3, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(image[0, 6], alone.clip(own.min(), own.max()), atol=1e-4)
    resampled = preprocess_label(label, geometry, plan)
    sizes = zip((6, 10, 12), (12, 12, 15), strict=True)
    d, h, w = (((np.arange(new) + 0.5) * old / new).astype(int) for old, new in sizes)
    np.testing.assert_array_equal(resampled, label[np.ix_(d, h, w)])


def test_cropped_to_the_labels_only_where_the_plan_says_so_and_a_label_is_there() -> None:
    scan = framed((20, 30, 40), (4.0, 1.0, 1.0))
    label = np.zeros((20, 30, 40), np.uint8)
    label[8:10, 5:12, 33:38] = 2
    plan = make_plan(spacing=(2.0, 2.0, 1.0), crop="label", label_context=(3, 4, 5))
    image, geometry = preprocess_image(scan, plan, label)
    # 3 voxels of 2 mm are 1.5 of 4 mm, rounded to 2; 4 of 2 mm are 8 of 1 mm; the scan ends behind the third box.
    assert geometry.crop == ((6, 12), (0, 20), (28, 40))
    assert image.shape[1:] == target_shape(geometry, plan)
    back = restore_label(one_hot(preprocess_label(label, geometry, plan)).unbind(1), geometry, plan)
    assert back.shape == label.shape
    assert (back == label).mean() > 0.99
    whole = ((0, 20), (0, 30), (0, 40))
    assert preprocess_image(scan, plan)[1].crop == whole
    assert preprocess_image(scan, plan, np.zeros_like(label))[1].crop == whole
    assert preprocess_image(scan, make_plan(crop="none"), label)[1].crop == whole
    assert preprocess_image(scan, make_plan(), label)[1].crop == preprocess_image(scan, make_plan())[1].crop != whole


def test_the_label_box_follows_the_axes_of_the_plan() -> None:
    scan = framed((20, 30, 40))
    label = np.zeros((20, 30, 40), np.uint8)
    label[8, 9, 10] = 1
    plan = make_plan(axes=(2, 0, 1), crop="label", label_context=(1, 2, 3))
    assert preprocess_image(scan, plan, label)[1].crop == ((9, 12), (6, 11), (6, 13))


@pytest.mark.parametrize("spacing", [(None, 1.1, 1.1), (4.5, 1.1, 1.1)])
def test_a_heart_looks_the_same_whichever_way_it_lies(
    spacing: tuple, short_axis_affines: list[NDArray[np.float64]]
) -> None:
    """But for quarter turns in the plane and the order of the slices: never in a mirror."""
    image = np.random.default_rng(0).normal(50, 20, (14, 11, 5)).astype(np.float32)
    label = np.random.default_rng(1).integers(0, 4, image.shape).astype(np.uint8)
    plan = make_plan(dimensions=2 if spacing[0] is None else 3, spacing=spacing, slices_first=True)
    found = []
    for affine in short_axis_affines:
        scan = scan_from_array(image, affine)
        prepared, geometry = preprocess_image(scan, plan)
        canonical = scan_from_array(label, affine).image[0].astype(np.uint8)
        found.append((prepared, preprocess_label(canonical, geometry, plan)))
    (first, first_label), *others = found
    poses = [(turns, step) for turns in range(4) for step in (1, -1)]
    for other, other_label in others:
        turned = [np.rot90(other[0], turns, (1, 2))[::step] for turns, step in poses]
        fits = [part.shape == first.shape[1:] and np.allclose(part, first[0], atol=1e-4) for part in turned]
        assert sum(fits) == 1
        turns, step = poses[fits.index(True)]
        # Where two classes weigh the same, rounding chooses.
        assert (np.rot90(other_label, turns, (1, 2))[::step] == first_label).mean() > 0.99
