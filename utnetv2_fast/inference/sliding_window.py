"""Averaging networks' predictions over the overlapping windows of a volume, and giving it plane by plane."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import torch
from torch import Tensor

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
    networks: Sequence[Callable[[Tensor], Tensor]],
    image: Tensor,
    window: Sequence[int],
    *,
    overlap: float = 0.5,
    weighting: Weighting = "gaussian",
    batch_size: int = 1,
    mirror_axes: Sequence[int] = (),
) -> Iterator[Tensor]:
    """Class probabilities of every voxel: the mean softmax of all networks, averaged over the windows that hold it.

    The windows are taken in the order of the first axis, and a plane is given as soon as no later window touches it.
    So the sums of as many planes as a window is deep are all that is ever held.

    Args:
        networks: each maps windows (N, C, *window), 1 <= N <= batch_size, on the device of `image`, to logits
            (N, K, *window) of any floating dtype, on any device.
        image: (C, *spatial), of any size. For a 2D network, slice by slice, the windows have depth 1.
        window: size of the windows, one number per spatial axis. Where it is larger than the image, that is surrounded
            by zeros, the mean of a z-scored image.
        overlap: share of its size by which a window at least overlaps the next.
        weighting: "uniform", or "gaussian": a window counts most at its centre (standard deviation window / 8), where
            the network sees most context.
        batch_size: how many windows go through a network at once. Windows are summed one by one in a fixed order, so
            the result depends on it only as far as the networks do.
        mirror_axes: spatial axes, from 0; predictions are averaged over the flips along every subset of them.

    Yields:
        For every index of the first spatial axis in turn, (K, *spatial[1:]) float32 on the device of `image`, valid
        until the next plane is asked for; the K probabilities of a voxel sum to one.
    """
    sizes = image.shape[1:]
    if len(window) != len(sizes):
        raise ValueError(f"window {tuple(window)} does not fit an image of shape {tuple(image.shape)}")
    axes = [_axis(s, w, overlap, weighting, image.device) for s, w in zip(sizes, window, strict=True)]
    flips = [[2 + a for a in subset] for n in range(len(mirror_axes) + 1) for subset in combinations(mirror_axes, n)]
    places = list(product(*(range(len(axis.starts)) for axis in axes)))
    inside = (slice(None), *(axis.inside for axis in axes))
    depth = axes[0].length
    sums = image.new_empty(0)  # (depth, K, *spatial[1:]), plane i of the image in row i % depth
    given = 0
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        probabilities = _mean_softmax(networks, torch.stack([_cut(image, axes, p) for p in batch]), flips)
        probabilities = probabilities.to(image.device)
        if not sums.numel():
            sums = image.new_zeros((depth, probabilities.shape[1], *sizes[1:]), dtype=torch.float32)
        for place, probability in zip(batch, probabilities, strict=True):
            start, *columns = (axis.region(index) for axis, index in zip(axes, place, strict=True))
            for plane in range(given, start.start):
                yield sums[plane % depth]
                sums[plane % depth].zero_()
            given = max(given, start.start)
            share = functools.reduce(
                torch.mul,
                (
                    axis.shares[index].view(-1, *[1] * (len(axes) - 1 - number))
                    for number, (axis, index) in enumerate(zip(axes, place, strict=True))
                ),
            )
            addend = probability[inside].movedim(1, 0)  # (depth, K, ...)
            row = start.start % depth
            # The rows are a ring: the window's planes lie in those from `row` to the end, then in the first.
            for rows, part in ((slice(row, depth), slice(0, depth - row)), (slice(0, row), slice(depth - row, depth))):
                region = (rows, slice(None), *columns)
                sums[region].addcmul_(addend[part], share[part].unsqueeze(1))
    for plane in range(given, sizes[0]):
        yield sums[plane % depth]


@dataclass(frozen=True)
class _Axis:
    """The windows along one axis: where they begin, which part of them lies over the image, how much they count.

    shares   one tensor (length,) float32 per window, its share in the average at each of its voxels
    """

    window: int
    starts: list[int]
    inside: slice
    shares: list[Tensor]

    @property
    def length(self) -> int:
        """How many voxels of the image a window holds."""
        return self.inside.stop - self.inside.start

    def region(self, index: int) -> slice:
        """The voxels of the image in window `index`."""
        return slice(self.starts[index], self.starts[index] + self.length)


def _axis(size: int, window: int, overlap: float, weighting: Weighting, device: torch.device) -> _Axis:
    starts = window_starts(size, window, overlap)
    before = max(0, window - size) // 2
    inside = slice(before, before + min(size, window))
    shares = _shares(starts, max(size, window), window, weighting)
    return _Axis(window, starts, inside, [share[inside].to(device) for share in shares])


def _cut(image: Tensor, axes: Sequence[_Axis], place: Sequence[int]) -> Tensor:
    """The window at `place`, (C, *window), with zeros around an image that is smaller."""
    region = (slice(None), *(axis.region(index) for axis, index in zip(axes, place, strict=True)))
    part = image[region]
    window = [axis.window for axis in axes]
    if list(part.shape[1:]) == window:
        return part
    padded = image.new_zeros((len(image), *window))
    inside = (slice(None), *(axis.inside for axis in axes))
    padded[inside] = part
    return padded


def _mean_softmax(
    networks: Sequence[Callable[[Tensor], Tensor]], windows: Tensor, flips: Sequence[list[int]]
) -> Tensor:
    """(N, C, *window) -> (N, K, *window) float32, averaged over the networks and the flips."""
    total: Tensor | None = None
    for network, axes in product(networks, flips):
        logits = network(windows.flip(axes) if axes else windows)
        probabilities = logits.float().softmax(1)
        probabilities = probabilities.flip(axes) if axes else probabilities
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None  # there is at least one network, and the flip along no axis
    count = len(networks) * len(flips)
    return total if count == 1 else total.div_(count)


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
