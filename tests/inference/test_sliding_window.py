"""Every voxel gets the average of what the windows over it say: whatever the sizes, the weights and the batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utnetv2_fast.inference.sliding_window import Weighting, sliding_window, window_starts

WEIGHTINGS: tuple[Weighting, ...] = ("uniform", "gaussian")


def whole(predict: Callable[[Tensor], Tensor], image: Tensor, window: Sequence[int], **options: object) -> Tensor:
    """All planes of one network's prediction together: (C, *spatial) -> (K, *spatial)."""
    return torch.stack([plane.clone() for plane in sliding_window([predict], image, window, **options)], 1)  # type: ignore[arg-type]


def voxelwise(windows: Tensor) -> Tensor:
    """Logits that depend on the voxel alone: (N, C, *window) -> (N, 3, *window)."""
    x = windows.sum(1, keepdim=True)
    return torch.cat([x, x.square(), x.sin()], 1)


def positional(windows: Tensor) -> Tensor:
    """Logits that depend on everything in the window and on the place within it, so that any slip shows."""
    places = torch.arange(windows[0, 0].numel(), dtype=windows.dtype).view(windows.shape[2:])
    scale = windows.abs().amax(tuple(range(1, windows.ndim)), keepdim=True)
    x = windows.sum(1, keepdim=True)
    return torch.cat([x, (places * 0.37).cos() * x, scale * (places * 0.11).sin()], 1)


def brute_force(image: Tensor, window: tuple[int, ...], overlap: float, weighting: Weighting) -> np.ndarray:
    """The definition, in float64, window by window and then divided: (K, *spatial)."""
    sizes = image.shape[1:]
    padded = np.zeros((len(image), *(max(s, w) for s, w in zip(sizes, window, strict=True))))
    before = [max(0, w - s) // 2 for s, w in zip(sizes, window, strict=True)]
    inside = tuple(slice(b, b + s) for b, s in zip(before, sizes, strict=True))
    padded[(..., *inside)] = image.numpy()
    weight = np.ones(window)
    if weighting == "gaussian":
        for place in np.ndindex(*window):
            distances = [(p - (w - 1) / 2) / (w / 8) for p, w in zip(place, window, strict=True)]
            weight[place] = math.exp(-0.5 * sum(d * d for d in distances))
    axes = []
    for size, length in zip(padded.shape[1:], window, strict=True):
        count = 1 if size == length else math.ceil((size - length) / max(1, length * (1 - overlap))) + 1
        axes.append({round(i * (size - length) / max(1, count - 1)) for i in range(count)})
    total, weights = np.zeros((3, *padded.shape[1:])), np.zeros(padded.shape[1:])
    for start in itertools.product(*axes):
        region = tuple(slice(s, s + w) for s, w in zip(start, window, strict=True))
        [logits] = positional(torch.from_numpy(padded[(..., *region)])[None]).numpy()
        exponential = np.exp(logits - logits.max(0, keepdims=True))
        total[(..., *region)] += weight * exponential / exponential.sum(0, keepdims=True)
        weights[region] += weight
    return (total / weights)[(..., *inside)]


@settings(deadline=None)
@given(
    size=st.integers(1, 300),
    window=st.integers(1, 128),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]),
)
def test_window_starts_cover_the_axis_once_and_evenly(size: int, window: int, overlap: float) -> None:
    starts = window_starts(size, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, size - window)
    steps = np.diff(starts)
    assert (steps > 0).all(), "a window occurs twice"
    if len(steps):
        assert steps.max() <= math.ceil(max(1, window * (1 - overlap)))
        assert steps.max() - steps.min() <= 1
        # One window fewer would leave steps wider than the overlap allows.
        assert (size - window) / (len(steps)) <= max(1, window * (1 - overlap))
        assert len(steps) == 1 or (size - window) / (len(steps) - 1) > max(1, window * (1 - overlap))


@pytest.mark.parametrize(
    ("size", "window", "starts"),
    [(16, 16, [0]), (15, 16, [0]), (24, 16, [0, 8]), (32, 16, [0, 8, 16]), (33, 16, [0, 6, 11, 17]), (3, 1, [0, 1, 2])],
)
def test_window_starts_by_hand(size: int, window: int, starts: list[int]) -> None:
    assert window_starts(size, window) == starts


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_impossible_overlap_is_refused(overlap: float) -> None:
    with pytest.raises(ValueError, match="overlap"):
        window_starts(10, 4, overlap)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ((17, 23), (8, 8)),  # larger, odd
        ((8, 8), (8, 8)),  # equal: one window
        ((5, 3), (8, 6)),  # smaller, odd margin
        ((5, 31), (8, 6)),  # smaller in one axis, larger in another
        ((7, 12, 9), (4, 5, 6)),
        ((2, 12, 1), (4, 5, 6)),
        ((9,), (4,)),
    ],
)
@pytest.mark.parametrize("overlap", [0.5, 0.75])
def test_equals_the_definition(
    sizes: tuple[int, ...], window: tuple[int, ...], weighting: Weighting, overlap: float
) -> None:
    image = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(len(sizes)))
    result = whole(positional, image, window, overlap=overlap, weighting=weighting, batch_size=3)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), brute_force(image, window, overlap, weighting), atol=2e-6)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=3),
    window=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    weighting=st.sampled_from(WEIGHTINGS),
    mirror=st.booleans(),
)
def test_a_voxelwise_network_is_reproduced_everywhere(
    sizes: list[int], window: list[int], weighting: Weighting, mirror: bool
) -> None:
    image = torch.randn(2, *sizes)
    axes = tuple(range(len(sizes))) if mirror else ()
    result = whole(voxelwise, image, window[: len(sizes)], weighting=weighting, mirror_axes=axes, batch_size=4)
    torch.testing.assert_close(result, voxelwise(image[None]).softmax(1)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_constant_network_gives_a_constant_and_probabilities_sum_to_one(weighting: Weighting) -> None:
    logits = torch.tensor([3.0, -1.0, 0.5, 100.0])

    def constant(windows: Tensor) -> Tensor:
        return logits.view(1, -1, 1, 1, 1).expand(len(windows), -1, *windows.shape[2:])

    # A large window: where the Gaussian's corner is smallest, float32 must still know it.
    result = whole(constant, torch.zeros(1, 70, 65, 129), (64, 64, 64), weighting=weighting)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, logits.softmax(0).view(-1, 1, 1, 1).expand_as(result), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
@pytest.mark.parametrize(("sizes", "window"), [((21, 17), (8, 8)), ((3, 21, 17), (1, 8, 8)), ((9, 8, 11), (4, 5, 5))])
def test_the_batch_size_changes_no_bit(batch_size: int, sizes: tuple[int, ...], window: tuple[int, ...]) -> None:
    image = torch.randn(1, *sizes)
    seen: list[int] = []

    def predict(windows: Tensor) -> Tensor:
        seen.append(len(windows))
        return torch.cat([positional(w[None]) for w in windows])

    one = whole(positional, image, window, batch_size=1)
    assert torch.equal(whole(predict, image, window, batch_size=batch_size), one)
    windows = math.prod(len(window_starts(s, w)) for s, w in zip(sizes, window, strict=True))
    assert sum(seen) == windows, "each window once"
    assert len(seen) == math.ceil(windows / batch_size)


def test_slices_share_batches_without_seeing_each_other() -> None:
    slices = torch.randn(1, 5, 13, 10)
    together = whole(positional, slices, (1, 8, 8), batch_size=7)
    for i in range(5):
        torch.testing.assert_close(together[:, i], whole(positional, slices[:, i], (8, 8)))


def test_one_window_is_the_network_itself() -> None:
    image = torch.randn(1, 8, 12)
    assert torch.equal(whole(positional, image, (8, 12)), positional(image[None]).softmax(1)[0])


@pytest.mark.parametrize("mirror_axes", [(), (0, 1)])
def test_several_networks_are_averaged_window_by_window(mirror_axes: tuple[int, ...]) -> None:
    image = torch.randn(1, 19, 12)
    networks = [positional, voxelwise, lambda windows: positional(windows) * 2]
    options = {"mirror_axes": mirror_axes, "batch_size": 3}
    together = torch.stack([plane.clone() for plane in sliding_window(networks, image, (8, 8), **options)], 1)
    apart = [whole(network, image, (8, 8), **options) for network in networks]
    torch.testing.assert_close(together, sum(apart) / 3)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_planes_come_as_soon_as_no_window_touches_them_and_one_slab_is_held(batch_size: int) -> None:
    seen = 0

    def predict(windows: Tensor) -> Tensor:
        nonlocal seen
        seen += len(windows)
        return positional(windows)

    per_row, starts = 2, window_starts(40, 8)
    storages, sizes = set(), set()
    for plane, value in enumerate(sliding_window([predict], torch.randn(1, 40, 12), (8, 8), batch_size=batch_size)):
        rows = sum(start <= plane for start in starts)  # that have a window over this plane, or had one
        assert seen <= math.ceil(min(rows + 1, len(starts)) * per_row / batch_size) * batch_size
        storages.add(value.untyped_storage().data_ptr())
        sizes.add(value.untyped_storage().nbytes())
    assert plane == 39
    assert (len(storages), sizes) == (1, {4 * 8 * 3 * 12})


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_mirroring_averages_every_subset_of_the_axes(axes: tuple[int, ...]) -> None:
    image = torch.randn(1, 4, 5, 6)
    calls = 0

    def predict(windows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return positional(windows)

    result = whole(predict, image, (4, 5, 6), mirror_axes=axes)
    assert calls == 2 ** len(axes)
    expected = torch.zeros_like(result)
    for chosen in itertools.product([False, True], repeat=len(axes)):
        flip = [2 + a for a, yes in zip(axes, chosen, strict=True) if yes]
        expected += positional(image[None].flip(flip)).softmax(1).flip(flip)[0] / 2 ** len(axes)
    torch.testing.assert_close(result, expected)
    # So the average commutes with a flip of the image.
    flipped = whole(predict, image.flip(1 + axes[0]), (4, 5, 6), mirror_axes=axes)
    torch.testing.assert_close(flipped, result.flip(1 + axes[0]))


def test_half_precision_logits_are_averaged_in_float32() -> None:
    image = torch.randn(1, 20, 20)
    result = whole(lambda w: positional(w).bfloat16(), image, (8, 8))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.sum(0), torch.ones(20, 20), atol=1e-6, rtol=0)


def test_padding_is_the_mean_of_a_z_scored_image() -> None:
    seen: list[Tensor] = []

    def predict(windows: Tensor) -> Tensor:
        seen.append(windows)
        return windows

    assert whole(predict, torch.ones(2, 3, 4), (6, 4)).shape == (2, 3, 4)
    assert torch.equal(seen[0][0, 0, :, 0], torch.tensor([0.0, 1, 1, 1, 0, 0]))


def test_a_window_of_the_wrong_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        whole(positional, torch.zeros(1, 8, 8, 8), (8, 8))


def test_no_graph_is_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    assert not whole(lambda w: w * weight, torch.zeros(1, 4, 4), (4, 4)).requires_grad
