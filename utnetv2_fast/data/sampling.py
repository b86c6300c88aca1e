"""Training patches: each batch is a pure function of the seed and the step, so that resuming needs no saved state."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from utnetv2_fast.data.prepare import PreparedCase

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """What was read for one step, on the CPU."""

    image: torch.Tensor  # (B, C, *source_size) float32, 0 outside the scan
    label: torch.Tensor  # (B, *source_size) uint8, background outside the scan
    cases: tuple[str, ...]


@dataclass(frozen=True)
class PatchSampler:
    """Draws patches by nnU-Net's rule: cases uniformly, a share of the patches around foreground, the rest anywhere.

    patch_size   two axes (a slice along axis 0 of the case) or three; the patch lies inside the scan wherever it fits
    source_size  at least patch_size: what is read, with the patch in its middle, so that it can be turned and scaled
    """

    cases: Sequence[PreparedCase]
    patch_size: tuple[int, ...]
    source_size: tuple[int, ...]
    batch_size: int
    seed: int
    foreground_fraction: float = 1 / 3

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError("a sampler needs at least one case")
        if len(self.patch_size) not in (2, 3) or len(self.source_size) != len(self.patch_size):
            raise ValueError(
                f"patch_size {self.patch_size} and source_size {self.source_size} must have 2 or 3 axes both"
            )
        if any(source < patch for source, patch in zip(self.source_size, self.patch_size, strict=True)):
            raise ValueError(f"source_size {self.source_size} is smaller than patch_size {self.patch_size}")

    def batch(self, step: int, part: range | None = None) -> Batch:
        """The batch of `step` (>= 0), or `part` of its samples. The last ones of all are those forced onto foreground.

        Their number is batch_size * foreground_fraction, rounded up or down at random such that the share holds on
        average however small the batch.
        """
        rounding = np.random.default_rng((self.seed, step, self.batch_size)).random()
        forced = math.floor(self.batch_size * self.foreground_fraction + rounding)
        part = range(self.batch_size) if part is None else part
        samples = [self._sample(step, i, i >= self.batch_size - forced) for i in part]
        images, labels, names = zip(*samples, strict=True)
        return Batch(torch.stack(images), torch.stack(labels), names)

    def _sample(self, step: int, i: int, forced: bool) -> tuple[torch.Tensor, torch.Tensor, str]:
        rng = np.random.default_rng((self.seed, step, i))
        case = self.cases[int(rng.integers(len(self.cases)))]
        image, label = case.image(), case.label()
        centre = _foreground_voxel(case.foreground(), rng) if forced else None
        if len(self.patch_size) == 2:
            d = int(rng.integers(label.shape[0])) if centre is None else centre[0]
            image, label = image[:, d], label[d]
            centre = None if centre is None else centre[1:]
        start = _place(label.shape, self.patch_size, centre, rng)
        # (source - patch) // 2 is where the augmentation expects the patch.
        start = tuple(s - (size - p) // 2 for s, size, p in zip(start, self.source_size, self.patch_size, strict=True))
        return (
            _read(image, start, self.source_size, torch.float32),
            _read(label, start, self.source_size, torch.uint8),
            case.name,
        )


def _foreground_voxel(foreground: np.ndarray, rng: np.random.Generator) -> tuple[int, ...] | None:
    """One stored voxel (d, h, w) of a class drawn uniformly among those present; None in a case without foreground."""
    if not len(foreground):
        return None
    chosen = rng.choice(np.unique(foreground[:, 0]))
    d, h, w = rng.choice(foreground[foreground[:, 0] == chosen, 1:])
    return int(d), int(h), int(w)


def _place(
    shape: Sequence[int], patch_size: Sequence[int], centre: Sequence[int] | None, rng: np.random.Generator
) -> tuple[int, ...]:
    """Where a patch starts: around `centre` or anywhere, in the scan if it fits, else with the scan in its middle."""
    starts = []
    for axis, (size, patch) in enumerate(zip(shape, patch_size, strict=True)):
        low, high = (0, size - patch) if size >= patch else ((size - patch) // 2,) * 2
        start = rng.integers(low, high, endpoint=True) if centre is None else centre[axis] - patch // 2
        starts.append(int(min(max(start, low), high)))
    return tuple(starts)


def _read(array: np.ndarray, start: Sequence[int], size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The box from `start` of the trailing axes of `array` as a tensor of `dtype`, zero where it leaves the array."""
    leading = array.shape[: array.ndim - len(size)]
    box = torch.zeros(*leading, *size, dtype=dtype)
    source, target = [slice(None)] * len(leading), [slice(None)] * len(leading)
    for first, extent, available in zip(start, size, array.shape[len(leading) :], strict=True):
        low, high = max(first, 0), min(first + extent, available)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    # Copied as stored (only this box leaves the file) and converted by torch, which is many times faster from float16.
    box[tuple(target)] = torch.from_numpy(np.array(array[tuple(source)]))
    return box


def prefetch(make: Callable[[int], T], steps: Iterable[int], ahead: int = 2) -> Generator[T, None, None]:
    """Yield make(step) for each step in order, while one background thread works up to `ahead` steps ahead.

    What `make` raises is raised here, at its step. Closing the iterator ends the thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for step in steps:
                pending.append(pool.submit(make, step))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
