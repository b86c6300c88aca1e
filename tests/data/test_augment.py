"""Augmentation against independent implementations, and what must hold for every profile, seed and input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from utnetv2_fast.data import augment as module
from utnetv2_fast.data.augment import PROFILES, AugmentationProfile, Effect, augment, source_size
from utnetv2_fast.training.recipe import load_recipe

ISOTROPIC, THICK, SLICE = (1.0, 0.8, 1.3), (5.0, 0.8, 1.3), (0.8, 1.3)


def always(low: float, high: float | None = None) -> Effect:
    return Effect(probability=1, low=low, high=low if high is None else high)


def run(
    image: np.ndarray | torch.Tensor,
    profile: AugmentationProfile,
    patch: Sequence[int] | None = None,
    label: torch.Tensor | None = None,
    spacing: Sequence[float] | None = None,
    seed: tuple[int, ...] = (0, 0),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment image (B, C, *source); without a patch there is nothing around it."""
    image = torch.as_tensor(image, dtype=torch.float32)
    label = torch.zeros((image.shape[0], *image.shape[2:]), dtype=torch.uint8) if label is None else label
    patch = image.shape[2:] if patch is None else patch
    return augment(image, label, patch, spacing or (1.0,) * len(patch), profile, seed)


def smooth(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.0)


def turn(i: int, j: int, degrees: float, axes: int) -> np.ndarray:
    matrix, angle = np.eye(axes), math.radians(degrees)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


# --- geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "spacing", "rotation"),
    [
        ((24, 20), SLICE, turn(0, 1, 25, 2)),
        ((8, 24, 20), THICK, turn(1, 2, 25, 3)),
        ((10, 24, 20), ISOTROPIC, turn(1, 2, 25, 3) @ turn(2, 0, 25, 3) @ turn(0, 1, 25, 3)),
    ],
)
def test_rotation_and_scaling_equal_scipys_affine_transform(
    patch: tuple[int, ...], spacing: tuple[float, ...], rotation: np.ndarray
) -> None:
    profile = AugmentationProfile(rotation=always(25), rotation_in_plane=always(25), scaling=always(1.2))
    source = source_size(patch, profile, spacing)
    image = smooth(source)
    label = (image > 0).astype(np.uint8) + (image > 0.1)
    scales = np.array([1.0 if spacing == THICK and axis == 0 else 1.2 for axis in range(len(patch))])
    matrix = np.diag(1 / np.array(spacing)) @ rotation @ np.diag(np.array(spacing) * scales)
    offset = (np.array(source) - 1) / 2 - matrix @ ((np.array(patch) - 1) / 2)
    expected = ndimage.affine_transform(image, matrix, offset, patch, order=1)
    expected_label = ndimage.affine_transform(label, matrix, offset, patch, order=0)
    got, got_label = run(image[None, None], profile, patch, torch.from_numpy(label)[None], spacing)
    np.testing.assert_allclose(got[0, 0], expected, atol=1e-5)
    assert (got_label[0].numpy() != expected_label).mean() < 1e-3


@pytest.mark.parametrize(("source", "spacing"), [((41, 21), (0.5, 1.0)), ((7, 41, 21), (4.0, 0.5, 1.0))])
def test_a_point_turns_by_the_angle_in_millimetres(source: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    label = torch.zeros(1, *source, dtype=torch.uint8)
    centre = [n // 2 for n in source]
    label[(0, *centre[:-2], centre[-2] + 16, centre[-1])] = 1  # 8 mm along axis -2
    profile = AugmentationProfile(rotation_in_plane=always(90))
    _, turned = run(torch.zeros(1, 1, *source), profile, source, label, spacing)
    # The patch turns by 90 degrees in the source, so what it shows turns by -90: to 8 mm along axis -1, in its slice.
    got = turned[0].nonzero().double()
    np.testing.assert_allclose(got.mean(0), [*centre[:-2], centre[-2], centre[-1] - 8], atol=0.51)


def test_thick_slices_never_mix() -> None:
    image = torch.arange(1.0, 9).view(1, 1, 8, 1, 1).expand(1, 1, 8, 40, 40)
    profile = AugmentationProfile(rotation=always(30), rotation_in_plane=always(-180, 180), scaling=always(0.9))
    out, _ = run(image, profile, (8, 20, 20), spacing=(3.1, 1, 1))
    torch.testing.assert_close(out, image[..., :20, :20].contiguous())
    mixed, _ = run(image, profile, (8, 20, 20), spacing=(2.9, 1, 1))
    assert not torch.allclose(mixed, out, atol=0.1)


def test_each_axis_of_a_volume_turns() -> None:
    """The plane across an axis changes only if the volume turns about another one."""
    profile = AugmentationProfile(rotation=always(-30, 30))
    for axis in range(3):
        ramp = torch.arange(21.0).view([-1 if a == axis else 1 for a in range(3)]).expand(1, 1, 21, 21, 21)
        out, _ = run(ramp, profile, (9, 9, 9), seed=(axis, 0))
        for across in range(3):
            assert out[0, 0].diff(dim=across).abs().max() > 0.05


@pytest.mark.parametrize(("patch", "spacing"), [((24, 20), SLICE), ((8, 24, 20), THICK), ((10, 24, 20), ISOTROPIC)])
@pytest.mark.parametrize("stay", [True, False])
def test_shear_and_scales_per_axis_equal_scipys_affine_transform(
    patch: tuple[int, ...], spacing: tuple[float, ...], stay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn is noted on its way into the matrix, and the matrix is built anew in millimetres."""
    drawn = []
    matrices = module._matrices
    monkeypatch.setattr(module, "_matrices", lambda *given: drawn.append(given) or matrices(*given))
    profile = AugmentationProfile(
        rotation=always(25),
        rotation_in_plane=always(25),
        scaling=always(0.7, 1.3),
        scaling_per_axis=True,
        shear=always(-0.3, 0.3),
        thick_slices_stay=stay,
    )
    source = source_size(patch, profile, spacing)
    image = smooth(source)
    got, _ = run(image[None, None], profile, patch, spacing=spacing)
    _, scales, shears, _ = drawn[-1]
    axes, planar = len(patch), len(patch) == 2 or (stay and spacing == THICK)
    scales, (down, across) = scales[0].numpy().copy(), shears[0].tolist()
    assert len(set(scales.tolist())) == axes
    assert down != across
    if planar and axes == 3:
        scales[0] = 1
    slant = np.eye(axes)
    slant[-2, -1], slant[-1, -2] = down, across
    planes = [(axes - 2, axes - 1)] if planar else [(1, 2), (2, 0), (0, 1)]
    rotation = np.linalg.multi_dot([np.eye(axes), *(turn(i, j, 25, axes) for i, j in planes)])
    matrix = np.diag(1 / np.array(spacing)) @ rotation @ slant @ np.diag(np.array(spacing) * scales)
    offset = (np.array(source) - 1) / 2 - matrix @ ((np.array(patch) - 1) / 2)
    expected = ndimage.affine_transform(image, matrix, offset, patch, order=1)
    np.testing.assert_allclose(got[0, 0], expected, atol=1e-5)
    ones = torch.ones(1, 1, *source)
    assert min(run(ones, profile, patch, spacing=spacing, seed=(s, 0))[0].min() for s in range(20)) > 1 - 1e-4


def test_moved_together_or_not_at_all() -> None:
    """A third of the samples is rotated; with `moves_together` no other one is scaled or sheared."""
    third, half = Effect(probability=1 / 3, low=90, high=90), Effect(probability=0.5, low=1.5, high=1.5)
    slanted = Effect(probability=0.5, low=0.4, high=0.4)
    image = torch.from_numpy(smooth((900, 1, 12, 12))).float()
    for together, expected in ((True, 1 / 3), (False, 1 - 2 / 3 * 0.5 * 0.5)):
        profile = AugmentationProfile(rotation_in_plane=third, scaling=half, shear=slanted, moves_together=together)
        moved = (run(image, profile)[0] != image).flatten(1).any(1).float().mean().item()
        assert moved == pytest.approx(expected, abs=0.05)


def test_each_axis_mirrors_with_its_own_probability() -> None:
    ramp = torch.arange(16.0).view(1, 1, 4, 4).expand(4000, 1, 4, 4)
    out, _ = run(ramp, AugmentationProfile(mirror_axes=(0, 1), mirror_probability=(0.2, 0.6)))
    down, across = (out.diff(dim=axis).mean((1, 2, 3)) < 0 for axis in (2, 3))
    assert down.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert across.float().mean().item() == pytest.approx(0.6, abs=0.03)
    with pytest.raises(ValidationError, match="one for each"):
        AugmentationProfile(mirror_axes=(0, 1), mirror_probability=(0.2,))


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_strengths_have_their_distribution(draw: str) -> None:
    effect = Effect(probability=1, low=0.5, high=1.6, draw=draw)
    ones = torch.ones(20000, 1, 1, 1)
    factors = run(ones, AugmentationProfile(brightness=effect))[0].flatten()
    if draw == "normal":
        assert factors.mean().item() == pytest.approx(1.05, abs=0.02)
        assert factors.std().item() == pytest.approx(0.55, abs=0.02)
        assert (factors < 0.5).float().mean().item() == pytest.approx(0.159, abs=0.01)
        return
    assert 0.5 <= factors.min() < 0.52
    assert 1.58 < factors.max() <= 1.6
    assert (factors < 1).float().mean().item() == pytest.approx(0.5 / 1.1, abs=0.015)


def test_source_size_of_every_profile_in_a_recipe_suffices() -> None:
    for name, spacing in (("acdc-2d", SLICE), ("acdc-3d", (5.0, 1.5, 1.5)), ("bcv-3d", (3.0, 0.75, 0.75))):
        recipe = load_recipe(name, "paper").training.augmentation
        assert isinstance(recipe, AugmentationProfile)
        spatial = {
            field: getattr(recipe, field)
            for field in ("rotation", "rotation_in_plane", "scaling", "scaling_per_axis", "shear", "thick_slices_stay")
        }
        profile = AugmentationProfile(**spatial)
        patch = (24, 20) if spacing == SLICE else (6, 24, 20)
        source = source_size(patch, profile, spacing)
        out, _ = run(torch.ones(40, 1, *source), profile, patch, spacing=spacing)
        assert out.min() > 1 - 1e-4


def test_an_elongated_slice_keeps_its_pose() -> None:
    label = torch.zeros(1, 161, 161, dtype=torch.uint8)
    label[0, 80, 81:] = 1
    profile = AugmentationProfile(rotation_in_plane=always(-180, 180))

    def angles(spacing: tuple[float, float]) -> np.ndarray:
        found = []
        for step in range(40):
            _, out = run(torch.zeros(1, 1, 161, 161), profile, (101, 101), label, spacing, (0, step))
            h, w = (out[0].nonzero().double().mean(0) - 50).tolist()
            found.append(math.degrees(math.atan2(h * spacing[0], w * spacing[1])))
        return np.abs(found)

    assert angles((1.0, 1.4)).max() > 90
    assert 5 < angles((1.0, 1.6)).max() < 16


@pytest.mark.parametrize("name", ["paper", "nnunet"])
@pytest.mark.parametrize(
    ("patch", "spacing"),
    [((33, 48), SLICE), ((16, 40, 24), THICK), ((13, 24, 20), ISOTROPIC), ((12, 12, 12), (1.0, 1.0, 1.0))],
)
def test_source_size_suffices_and_is_not_wasteful(
    name: str, patch: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    """At extreme angles and scales nothing outside the source is seen, so a constant source gives a constant patch."""
    profile = PROFILES[name].model_copy(
        update={field: Effect(probability=0, low=1, high=1) for field in ("noise", "shift", "contrast", "brightness")}
        | {"scaling": always(PROFILES[name].scaling.high)}
        | {
            f: getattr(PROFILES[name], f).model_copy(update={"probability": 1})
            for f in ("rotation", "rotation_in_plane")
        }
    )
    source = source_size(patch, profile, spacing)
    assert all((s - p) % 2 == 0 for s, p in zip(source, patch, strict=True))
    if spacing == THICK:
        assert source[0] == patch[0]
    ones, label = torch.ones(60, 1, *source), torch.ones(60, *source, dtype=torch.uint8)
    image, turned = run(ones, profile, patch, label, spacing)
    assert image.min() > 1 - 1e-4
    assert (turned == 1).all()
    # In a plane, where 60 angles come close to every extreme, the patch does reach the outermost voxels.
    if len(patch) == 2 or spacing == THICK:
        hollow = ones.clone()
        hollow[..., 3:-3, 3:-3] = 0
        assert run(hollow, profile, patch, label, spacing)[0].max() > 0


@pytest.mark.parametrize(("source", "patch"), [((20, 21), (8, 8)), ((6, 20, 21), (4, 9, 8))])
def test_what_is_not_turned_is_cropped_from_the_middle_exactly(source: tuple[int, ...], patch: tuple[int, ...]) -> None:
    image = torch.randn(2, 3, *source)
    label = torch.randint(0, 4, (2, *source), dtype=torch.uint8)
    got, got_label = run(image, PROFILES["none"], patch, label)
    middle = tuple(slice((s - p) // 2, (s - p) // 2 + p) for s, p in zip(source, patch, strict=True))
    assert torch.equal(got, image[(..., *middle)])
    assert torch.equal(got_label, label[(..., *middle)].long())
    # A turn by nothing goes through the resampling, about the same centre.
    turned, turned_label = run(
        image, AugmentationProfile(rotation=always(0), rotation_in_plane=always(0)), patch, label
    )
    torch.testing.assert_close(turned, got, atol=1e-4, rtol=1e-4)
    assert torch.equal(turned_label, got_label)


@pytest.mark.parametrize("name", sorted(PROFILES))
@pytest.mark.parametrize(("patch", "spacing"), [((24, 24), SLICE), ((8, 24, 24), THICK), ((16, 24, 24), ISOTROPIC)])
def test_label_stays_aligned_with_the_image(name: str, patch: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """The image is the label's own indicator: where either is far from an edge, both must agree."""
    profile = PROFILES[name]
    spatial = {f: getattr(profile, f) for f in ("rotation", "rotation_in_plane", "scaling", "mirror_axes")}
    source = source_size(patch, profile, spacing)
    label = torch.from_numpy(smooth((6, *source)) > 0.03).to(torch.uint8)
    image, out = run(label[:, None], AugmentationProfile(**spatial), patch, label, spacing)
    sure = (image[:, 0] < 0.01) | (image[:, 0] > 0.99)
    assert sure.float().mean() > 0.3
    assert torch.equal((image[:, 0] > 0.5)[sure], (out == 1)[sure])
    assert set(out.unique().tolist()) == {0, 1}


def test_beyond_the_source_lie_zero_and_background() -> None:
    image, label = torch.ones(1, 1, 20, 20), torch.full((1, 20, 20), 3, dtype=torch.uint8)
    out, out_label = run(image, AugmentationProfile(scaling=always(2)), label=label)
    assert out[0, 0, 0, 0] == 0
    assert out_label[0, 0, 0] == 0
    assert out[0, 0, 10, 10] == 1
    assert out_label[0, 10, 10] == 3
    assert 90 <= (out_label == 3).sum() <= 110  # half as long and half as wide


@pytest.mark.parametrize(("axes", "mirrored"), [(None, {1, 2, 3}), ((2,), {3}), ((), set())])
@pytest.mark.parametrize("scaling", [1.0, None])
def test_mirroring_flips_the_named_axes_half_the_time(
    axes: tuple[int, ...] | None, mirrored: set[int], scaling: float | None
) -> None:
    label = torch.arange(24).view(1, 2, 3, 4).expand(64, 2, 3, 4)
    profile = AugmentationProfile(mirror_axes=axes)
    if scaling is not None:  # through the resampling as well
        profile = profile.model_copy(update={"scaling": always(scaling)})
    image, out = run(label[:, None].float(), profile, label=label)
    torch.testing.assert_close(image[:, 0], out.float(), atol=1e-4, rtol=1e-4)
    flips = {
        tuple(a for a in (1, 2, 3) if bits >> a & 1): label[:1].flip([a for a in (1, 2, 3) if bits >> a & 1])[0]
        for bits in range(0, 16, 2)
    }
    found = [next(flip for flip, flipped in flips.items() if torch.equal(sample, flipped)) for sample in out]
    assert set().union(*found) == mirrored
    for axis in mirrored:
        assert 16 <= sum(axis in flip for flip in found) <= 48


# --- intensities ---------------------------------------------------------------------------------------------------

SHAPES = [(2, 3, 30, 26), (2, 3, 12, 30, 26)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shift_brightness_and_contrast_are_what_they_say(shape: tuple[int, ...]) -> None:
    image = torch.from_numpy(smooth(shape)).float()
    torch.testing.assert_close(run(image, AugmentationProfile(shift=always(0.3)))[0], image + 0.3)
    torch.testing.assert_close(run(image, AugmentationProfile(brightness=always(0.8, 0.8)))[0], image * 0.8)
    spatial = tuple(range(2, len(shape)))
    mean, low, high = image.mean(spatial, True), image.amin(spatial, True), image.amax(spatial, True)
    for factor in (0.75, 1.25):
        out, _ = run(image, AugmentationProfile(contrast=always(factor)))
        expected = torch.minimum(torch.maximum((image - mean) * factor + mean, low), high)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("field", ["gamma", "inverted_gamma"])
@pytest.mark.parametrize("exponent", [0.7, 1.5])
def test_gamma_is_a_power_of_the_range_with_mean_and_deviation_kept(field: str, exponent: float) -> None:
    image = smooth((1, 1, 12, 30, 26))
    out, _ = run(image, AugmentationProfile(**{field: always(exponent)}))
    sign = -1 if field == "inverted_gamma" else 1
    x = sign * image
    raised = ((x - x.min()) / (x.max() - x.min())) ** exponent
    expected = sign * ((raised - raised.mean()) / raised.std() * x.std() + x.mean())
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 1, 4, 16, 16)])
def test_a_constant_image_stays_finite(value: float, shape: tuple[int, ...]) -> None:
    effects = {
        name: field.default.model_copy(update={"probability": 1, "low": 0.7, "high": 1.3})
        for name, field in AugmentationProfile.model_fields.items()
        if isinstance(field.default, Effect)
    }
    assert torch.isfinite(run(torch.full(shape, value), AugmentationProfile(**effects))[0]).all()
    for name in ("gamma", "inverted_gamma", "contrast", "blur", "low_resolution"):
        out, _ = run(torch.full(shape, value), AugmentationProfile(**{name: effects[name]}))
        torch.testing.assert_close(out, torch.full(shape, value))


@pytest.mark.parametrize(
    ("shape", "spacing", "sigmas"),
    [
        ((1, 1, 40, 30), SLICE, (1, 1)),
        ((1, 1, 20, 24, 28), ISOTROPIC, (1, 1, 1)),
        ((1, 1, 20, 24, 28), THICK, (0, 1, 1)),
    ],
)
def test_blur_is_a_gaussian_that_does_not_cross_thick_slices(
    shape: tuple[int, ...], spacing: tuple[float, ...], sigmas: tuple[float, ...]
) -> None:
    image = np.random.default_rng(0).normal(size=shape)
    out, _ = run(image, AugmentationProfile(blur=always(0.9)), spacing=spacing)
    expected = ndimage.gaussian_filter(image[0, 0], [0.9 * s for s in sigmas], truncate=6)
    inner = tuple(slice(5, -5) for _ in sigmas)
    np.testing.assert_allclose(out[0, 0][inner], expected[inner], atol=1e-5)
    ones, _ = run(np.ones(shape), AugmentationProfile(blur=always(0.9)), spacing=spacing)
    np.testing.assert_allclose(ones, 1, rtol=1e-6)  # edges do not darken


@pytest.mark.parametrize("fraction", [0.5, 0.63, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 41, 30), (1, 1, 16, 20, 24)])
def test_low_resolution_equals_torchs_interpolations(fraction: float, shape: tuple[int, ...]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=shape)).float()
    out, _ = run(image, AugmentationProfile(low_resolution=always(fraction)))
    size = [round(fraction * n) for n in shape[2:]]
    coarse = torch.nn.functional.interpolate(image, size, mode="nearest-exact")
    mode = "bilinear" if len(shape) == 4 else "trilinear"
    torch.testing.assert_close(out, torch.nn.functional.interpolate(coarse, shape[2:], mode=mode), atol=1e-5, rtol=1e-5)


def test_noise_has_its_deviation_and_differs_between_samples_and_channels() -> None:
    out, _ = run(torch.zeros(2, 2, 40, 40, 40), AugmentationProfile(noise=always(0.2)))
    rows = out.flatten(0, 1).flatten(1)
    torch.testing.assert_close(rows.std(1), torch.full((4,), 0.2), atol=2e-3, rtol=0)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.02


def test_channels_get_their_own_strength() -> None:
    out, _ = run(torch.ones(1, 3, 8, 8), AugmentationProfile(brightness=always(0.5, 1.5)))
    assert len(out[0, :, 0, 0].unique()) == 3


def test_balanced_factors_fall_below_one_as_often_as_above() -> None:
    balanced = Effect(probability=1, low=0.5, high=3.0, draw="balanced")
    out, _ = run(torch.ones(4000, 1, 1, 1), AugmentationProfile(brightness=balanced))
    factors = out.flatten()
    assert factors.min() >= 0.5
    assert factors.max() <= 3
    assert (factors < 1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert factors[factors < 1].mean().item() == pytest.approx(0.75, abs=0.02)
    assert factors[factors > 1].mean().item() == pytest.approx(2.0, abs=0.06)


def test_an_effect_strikes_with_its_probability_and_leaves_the_others_alone() -> None:
    image = torch.randn(3000, 2, 4, 4)
    effect = Effect(probability=0.3, low=1, high=1, channel_probability=0.5)
    struck = run(image, AugmentationProfile(shift=effect))[0] != image
    channels = struck.all((2, 3))
    assert torch.equal(channels, struck.any((2, 3)))
    assert channels.float().mean().item() == pytest.approx(0.15, abs=0.015)
    # Given that one channel of a sample is struck, so is the other every second time: the sample was struck.
    both = channels.all(1).float().mean().item()
    assert both == pytest.approx(0.3 * 0.5 * 0.5, abs=0.015)


def test_the_profiles_have_the_published_probabilities() -> None:
    nnunet = PROFILES["nnunet"]
    image, label = torch.rand(4000, 1, 4, 4), torch.zeros(4000, 4, 4, dtype=torch.uint8)
    for name, probability in {"noise": 0.1, "blur": 0.1, "brightness": 0.15, "contrast": 0.15, "gamma": 0.3}.items():
        alone = AugmentationProfile(**{name: getattr(nnunet, name)})
        changed = (augment(image, label, (4, 4), (1, 1), alone, (1,))[0] != image).any(3).any(2).any(1)
        assert changed.float().mean().item() == pytest.approx(probability, abs=0.025), name
    assert PROFILES["nnunet-no-mirroring"] == nnunet.model_copy(update={"mirror_axes": ()})
    assert PROFILES["paper"].gamma.probability == 0
    assert PROFILES["paper"].mirror_axes == ()


# --- any input -----------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(sorted(PROFILES)),
    seed=st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)),
    case=st.sampled_from([((8, 8), SLICE), ((1, 5), (1.0, 1.0)), ((3, 8, 8), THICK), ((5, 6, 7), ISOTROPIC)]),
    channels=st.integers(1, 3),
    batch=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_the_result_depends_on_the_seed_and_the_input_alone(
    name: str,
    seed: tuple[int, int],
    case: tuple[tuple[int, ...], tuple[float, ...]],
    channels: int,
    batch: int,
) -> None:
    patch, spacing = case
    source = source_size(patch, PROFILES[name], spacing)
    image = torch.randn(batch, channels, *source, generator=torch.Generator().manual_seed(1))
    label = torch.randint(0, 200, (batch, *source), dtype=torch.uint8)
    before = image.clone(), label.clone()
    state = torch.get_rng_state()
    first = augment(image, label, patch, spacing, PROFILES[name], seed)
    torch.manual_seed(7)
    second = augment(image, label, patch, spacing, PROFILES[name], seed)
    torch.set_rng_state(state)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])
    assert first[0].shape == (batch, channels, *patch)
    assert first[0].dtype == torch.float32
    assert first[1].shape == (batch, *patch)
    assert first[1].dtype == torch.int64
    assert torch.isfinite(first[0]).all()


@pytest.mark.parametrize(("patch", "spacing"), [((12, 10), SLICE), ((4, 12, 10), THICK), ((8, 9, 10), ISOTROPIC)])
def test_parts_of_a_batch_become_what_they_become_in_the_whole(
    patch: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    """Whoever stands beside a sample, so that processes may divide a batch; the same sample differs by its index."""
    profile = PROFILES["nnunet"]
    source = source_size(patch, profile, spacing)
    image = torch.from_numpy(smooth((1, 2, *source))).float().repeat(12, *[1] * (len(patch) + 1))
    label = (image[:, 0] > 0).to(torch.uint8)
    whole, whole_label = augment(image, label, patch, spacing, profile, (0, 1))
    for first, last in ((0, 5), (5, 12), (7, 8)):
        part, part_label = augment(image[first:last], label[first:last], patch, spacing, profile, (0, 1), first)
        torch.testing.assert_close(part, whole[first:last], rtol=0, atol=1e-5)
        assert torch.equal(part_label, whole_label[first:last])
    assert len({tensor.numpy().tobytes() for tensor in whole}) > 6


def test_seeds_differ() -> None:
    image = torch.randn(4, 1, 8, 8)
    outs = [run(image, AugmentationProfile(noise=always(1)), seed=seed)[0] for seed in [(0, 0), (0, 1), (1, 0)]]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])


def test_half_precision_sources_are_computed_in_float32() -> None:
    image = torch.randn(4, 1, 40, 40).half()
    label = torch.zeros(4, 40, 40, dtype=torch.int16)
    half, _ = augment(image, label, (16, 16), (1, 1), PROFILES["nnunet"], (0, 3))
    single, _ = augment(image.float(), label, (16, 16), (1, 1), PROFILES["nnunet"], (0, 3))
    assert torch.equal(half, single)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("patch", "spacing"), [((48, 40), SLICE), ((8, 48, 40), THICK), ((24, 32, 28), ISOTROPIC)])
def test_the_gpu_does_what_the_cpu_does(patch: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    profile = PROFILES["nnunet"].model_copy(update={"noise": Effect(probability=0, low=0, high=0)})
    source = source_size(patch, profile, spacing)
    image, label = torch.from_numpy(smooth((8, 2, *source))).float(), torch.zeros(8, *source, dtype=torch.uint8)
    label[image[:, 0] > 0] = 1
    expected, expected_label = augment(image, label, patch, spacing, profile, (0, 0))
    got, got_label = augment(image.cuda(), label.cuda(), patch, spacing, profile, (0, 0))
    torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-4)
    assert (got_label.cpu() != expected_label).float().mean() < 1e-3


def test_what_does_not_fit_together_is_refused() -> None:
    image, label = torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    none = PROFILES["none"]
    with pytest.raises(ValueError, match="two or three axes"):
        augment(image, label, (8, 8), (1, 1, 1), none, (0,))
    with pytest.raises(ValueError, match="smaller than patch_size"):
        augment(image, label, (8, 9), (1, 1), none, (0,))
    with pytest.raises(ValueError, match=r"\(B, C, \*source\)"):
        augment(image, label[:1], (8, 8), (1, 1), none, (0,))
    with pytest.raises(ValidationError, match="exceeds high"):
        Effect(probability=1, low=2, high=1)
    with pytest.raises(ValidationError):
        AugmentationProfile(elastic=always(1))  # type: ignore[call-arg]
