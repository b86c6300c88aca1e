"""Averaging a network's predictions over the overlapping windows of an image, in two and three dimensions alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Weighting = Literal["gaussian", "uniform"]


def window_starts(size: int, window: int, overlap: float = 0.5) -> list[int]:
    """Where the windows begin along one axis: nnU-Net's even spacing, each start once, first 0, last `size - window`.

    As few windows as overlap by at least `overlap` of their size (to the voxel); one window at 0 if the axis is no
    longer than it.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
    if size <= window:
        return [0]
    count = math.ceil((size - window) / max(1.0, window * (1 - overlap))) + 1
    return [round(i * (size - window) / (count - 1)) for i in range(count)]


@torch.no_grad()
def sliding_window(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    window: Sequence[int],
    *,
    overlap: float = 0.5,
    weighting: Weighting = "gaussian",
    batch_size: int = 1,
    mirror_axes: Sequence[int] = (),
) -> Tensor:
    """Class probabilities of every voxel: the softmax of `predict`, averaged over all windows that hold the voxel.

    Args:
        predict: maps windows (N, C, *window), 1 <= N <= batch_size, on the device of `image`, to logits (N, K, *window)
            of any floating dtype, on any device.
        image: (B, C, *spatial), B >= 1, of any size. B is 1 for a volume; the slices of a volume that a 2D network
            predicts slice by slice are B images, which share batches.
        window: size of the windows, one number per spatial axis. A smaller image is padded with zeros, the mean of a
            z-scored image, and the result cropped.
        overlap: share of its size by which a window at least overlaps the next.
        weighting: "uniform", or "gaussian": a window counts most at its centre (standard deviation window / 8), where
            the network sees most context.
        batch_size: how many windows go through `predict` at once. Windows are summed one by one in a fixed order, so
            the result depends on it only as far as `predict` does.
        mirror_axes: spatial axes, from 0; predictions are averaged over the flips along every subset of them.

    Returns:
        (B, K, *spatial) float32 on the device of `image`; the K probabilities of a voxel sum to one.
    """
    sizes, dims = image.shape[2:], image.ndim - 2
    if len(window) != dims:
        raise ValueError(f"window {tuple(window)} does not fit an image of shape {tuple(image.shape)}")
    margins = [max(0, w - s) for s, w in zip(sizes, window, strict=True)]
    before = [m // 2 for m in margins]
    # functional.pad takes (before, after) pairs, last axis first.
    padding = [n for m, b in zip(reversed(margins), reversed(before), strict=True) for n in (b, m - b)]
    image = functional.pad(image, padding)

    starts = [window_starts(s, w, overlap) for s, w in zip(image.shape[2:], window, strict=True)]
    shares = [
        [share.to(image.device) for share in _shares(a, s, w, weighting)]
        for a, s, w in zip(starts, image.shape[2:], window, strict=True)
    ]
    flips = [[2 + a for a in subset] for n in range(len(mirror_axes) + 1) for subset in combinations(mirror_axes, n)]
    places = list(product(range(len(image)), product(*(range(len(s)) for s in starts))))
    total: Tensor | None = None
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        regions = [
            (slice(None), *(slice(starts[axis][i], starts[axis][i] + window[axis]) for axis, i in enumerate(place)))
            for _, place in batch
        ]
        windows = torch.stack([image[b][region] for (b, _), region in zip(batch, regions, strict=True)])
        for axes in flips:
            logits = predict(windows.flip(axes))  # (N, K, *window)
            probabilities = logits.float().softmax(1).flip(axes).to(image.device)
            if total is None:
                total = image.new_zeros((len(image), probabilities.shape[1], *image.shape[2:]), dtype=torch.float32)
            for (b, place), region, probability in zip(batch, regions, probabilities, strict=True):
                along_axes = (shares[axis][i].view(-1, *[1] * (dims - 1 - axis)) for axis, i in enumerate(place))
                total[b][region].addcmul_(probability, functools.reduce(torch.mul, along_axes), value=1 / len(flips))
    assert total is not None  # there is at least one window
    crop = (slice(None), slice(None), *(slice(b, b + s) for b, s in zip(before, sizes, strict=True)))
    return total[crop]


def _shares(starts: Sequence[int], size: int, window: int, weighting: Weighting) -> list[Tensor]:
    """What share each window along one axis has in the average at its voxels, (window,) float32 each.

    The windows of an image are the product of the windows of its axes, and so are their weights: the shares of each
    axis sum to one at every voxel, hence their products do, and no weights need to be accumulated and divided by.
    """
    position = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    # Four standard deviations from centre to edge: the smallest weight is exp(-8), so every voxel has one.
    weight = torch.exp(-0.5 * (position / (window / 8)) ** 2) if weighting == "gaussian" else torch.ones_like(position)
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += weight
    return [(weight / total[start : start + window]).float() for start in starts]
