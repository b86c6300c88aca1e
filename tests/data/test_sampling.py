"""Patch sampling is pure, keeps its share of foreground, stays inside scans and pads with zeros."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utnetv2_fast.data.sampling import PatchSampler, _place, prefetch


@dataclass(frozen=True)
class StoredCase:
    """A prepared case as it lies on disk: memory-mapped image and label, listed foreground voxels."""

    name: str
    folder: Path

    def image(self) -> np.ndarray:
        return np.load(self.folder / f"{self.name}.image.npy", mmap_mode="r")

    def label(self) -> np.ndarray:
        return np.load(self.folder / f"{self.name}.label.npy", mmap_mode="r")

    def foreground(self) -> np.ndarray:
        return np.load(self.folder / f"{self.name}.foreground.npy")


def store(folder: Path, name: str, image: np.ndarray, label: np.ndarray) -> StoredCase:
    voxels = np.argwhere(label)
    classes = label[tuple(voxels.T)]
    np.save(folder / f"{name}.image.npy", image.astype(np.float16))
    np.save(folder / f"{name}.label.npy", label.astype(np.uint8))
    np.save(folder / f"{name}.foreground.npy", np.column_stack([classes, voxels]).astype(np.int32))
    return StoredCase(name, folder)


def coordinates(shape: tuple[int, ...]) -> np.ndarray:
    """(3, *shape): every voxel tells where it is, counted from 1 so that padding (0) differs."""
    return np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in shape), indexing="ij"))


@pytest.fixture
def case(tmp_path: Path) -> StoredCase:
    label = np.zeros((12, 40, 44), np.uint8)
    label[2, 5, 6] = 1  # one voxel against a hundred of the other class
    label[8, 30:40, 30:40] = 2
    return store(tmp_path, "case", coordinates(label.shape), label)


def sampler(case: StoredCase, patch: tuple[int, ...], batch_size: int = 6, **changes: object) -> PatchSampler:
    values: dict[str, object] = {"source_size": patch, "seed": 3} | changes
    return PatchSampler([case], patch, batch_size=batch_size, **values)  # type: ignore[arg-type, list-item]


def test_a_batch_depends_on_seed_and_step_only(case: StoredCase) -> None:
    first, second = sampler(case, (4, 8, 8)), sampler(case, (4, 8, 8))
    second.batch(0)
    later = second.batch(7)
    now = first.batch(7)
    assert torch.equal(now.image, later.image)
    assert torch.equal(now.label, later.label)
    assert not torch.equal(now.image, first.batch(8).image)
    assert not torch.equal(now.image, sampler(case, (4, 8, 8), seed=4).batch(7).image)
    assert len({tuple(sample[:, 0, 0, 0].tolist()) for sample in now.image}) > 1


@pytest.mark.parametrize("patch", [(4, 8, 10), (8, 10)])
def test_image_and_label_come_from_one_place(case: StoredCase, patch: tuple[int, ...]) -> None:
    batch = sampler(case, patch, batch_size=20, foreground_fraction=0.8).batch(0)
    assert batch.image.shape == (20, 3, *patch)
    assert batch.image.dtype == torch.float32
    assert batch.label.dtype == torch.uint8
    assert batch.cases == ("case",) * 20
    label = np.array(case.label())
    for image, got in zip(batch.image.int().numpy(), batch.label.numpy(), strict=True):
        d, h, w = image - 1
        np.testing.assert_array_equal(got, label[d, h, w])
        assert len(np.unique(d)) == (patch[0] if len(patch) == 3 else 1)


def test_parts_of_a_batch_are_the_batch(case: StoredCase) -> None:
    drawn = sampler(case, (4, 8, 8))
    for step in range(3):
        whole, parts = drawn.batch(step), [drawn.batch(step, part) for part in (range(2), range(2, 6))]
        assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
        assert torch.equal(torch.cat([part.label for part in parts]), whole.label)
        assert parts[0].cases + parts[1].cases == whole.cases


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_a_third_is_forced_onto_foreground(tmp_path: Path, batch_size: int) -> None:
    label = np.zeros((1, 401, 401), np.uint8)
    label[0, 200, 200] = 1  # a uniform patch of 3 x 3 meets it once in 17689
    far = store(tmp_path, "far", label[None], label)
    steps = 3000 // batch_size
    drawn = sampler(far, (3, 3), batch_size)
    hits = [drawn.batch(step).label[:, 1, 1] == 1 for step in range(steps)]
    share = torch.stack(hits).float().mean().item()
    assert share == pytest.approx(1 / 3, abs=0.03)
    if batch_size == 12:
        assert all(hit.tolist() == [False] * 8 + [True] * 4 for hit in hits)


def test_a_class_of_one_voxel_is_drawn_as_often_as_a_large_one(case: StoredCase) -> None:
    drawn = sampler(case, (1, 1), batch_size=400, foreground_fraction=1.0)
    labels = drawn.batch(0).label.flatten()
    assert (labels > 0).all()
    assert (labels == 1).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_cases_are_drawn_uniformly_whatever_their_size(tmp_path: Path) -> None:
    small, large = (store(tmp_path, f"{n}", np.zeros((1, n, 9, 9)), np.zeros((n, 9, 9))) for n in (1, 50))
    names = PatchSampler([small, large], (4, 4), (4, 4), 400, seed=0).batch(0).cases
    assert names.count("1") / 400 == pytest.approx(0.5, abs=0.1)


def test_slices_are_uniform_unless_forced(case: StoredCase) -> None:
    d = sampler(case, (8, 8), 1200, foreground_fraction=0).batch(0).image[:, 0, 0, 0]
    counts = torch.bincount(d.long(), minlength=13)[1:]
    assert counts.min() > 60
    assert counts.max() < 140


def test_a_case_without_foreground_gives_uniform_patches(tmp_path: Path) -> None:
    empty = store(tmp_path, "empty", coordinates((4, 30, 30)), np.zeros((4, 30, 30)))
    batch = sampler(empty, (2, 5, 5), batch_size=50, foreground_fraction=1.0).batch(0)
    assert len(batch.image[:, 1, 0, 0, 0].unique()) > 10


def test_outside_the_scan_everything_is_zero(case: StoredCase) -> None:
    batch = sampler(case, (16, 48, 20), batch_size=4).batch(0)
    outside = (batch.image == 0).all(1)
    assert torch.equal(outside, (batch.image == 0).any(1))
    # The scan (12, 40, 44) lies in the middle of the two axes that it cannot fill, and fills the third.
    inside = torch.zeros(16, 48, 20, dtype=torch.bool)
    inside[2:14, 4:44] = True
    assert all(torch.equal(~sample, inside) for sample in outside)
    assert (batch.label[outside] == 0).all()


@given(
    size=st.integers(1, 40),
    patch=st.integers(1, 40),
    voxel=st.integers(0, 39),
    forced=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_a_patch_stays_inside_and_holds_its_voxel(size: int, patch: int, voxel: int, forced: bool, seed: int) -> None:
    voxel = min(voxel, size - 1)
    (start,) = _place([size], [patch], [voxel] if forced else None, np.random.default_rng(seed))
    if patch <= size:
        assert 0 <= start <= size - patch
    else:
        assert -start in ((patch - size) // 2, (patch - size + 1) // 2)
    if forced:
        assert start <= voxel < start + patch


def test_uniform_patches_reach_both_ends() -> None:
    rng = np.random.default_rng(0)
    starts = {_place([10], [7], None, rng) for _ in range(200)}
    assert starts == {(0,), (1,), (2,), (3,)}


def test_a_larger_source_keeps_the_patch_in_its_middle(case: StoredCase) -> None:
    patch, source = (4, 8, 8), (6, 20, 14)
    narrow = sampler(case, patch, 12).batch(5)
    wide = sampler(case, patch, 12, source_size=source).batch(5)
    middle = (slice(1, 5), slice(6, 14), slice(3, 11))
    assert torch.equal(wide.image[(..., *middle)], narrow.image)
    assert torch.equal(wide.label[(..., *middle)], narrow.label)
    # Around the patch lies what the scan has there, and zeros beyond it.
    scan = np.pad(case.image(), [(0, 0), (6, 6), (20, 20), (20, 20)])
    for narrow_image, wide_image in zip(narrow.image, wide.image, strict=True):
        d, h, w = (narrow_image[:, 0, 0, 0].int() - 1 - torch.tensor([1, 6, 3]) + torch.tensor([6, 20, 20])).tolist()
        np.testing.assert_array_equal(wide_image, scan[:, d : d + 6, h : h + 20, w : w + 14])


def test_what_does_not_fit_together_is_refused(case: StoredCase) -> None:
    with pytest.raises(ValueError, match="at least one case"):
        PatchSampler([], (4, 4), (4, 4), 1, 0)
    with pytest.raises(ValueError, match="smaller than patch_size"):
        sampler(case, (4, 4), source_size=(4, 3))
    with pytest.raises(ValueError, match="2 or 3 axes"):
        sampler(case, (4, 4), source_size=(4, 4, 4))


def test_prefetch_keeps_the_order_and_works_ahead() -> None:
    made: list[int] = []
    ahead = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 2:
            ahead.set()
        return step * step

    results = prefetch(make, range(6))
    assert next(results) == 0
    assert ahead.wait(10)  # steps 1 and 2 are made while nobody asks for them
    assert list(results) == [1, 4, 9, 16, 25]
    assert made == list(range(6))


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")}


def wait_for(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_prefetch_raises_at_the_step_that_failed() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("disk gone")
        return step

    results = prefetch(make, range(100))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(results)
    assert wait_for(lambda: not threads())


def test_closing_prefetch_ends_its_thread_and_drops_what_is_not_begun() -> None:
    made: list[int] = []
    released = threading.Event()

    def make(step: int) -> None:
        made.append(step)
        if step:
            released.wait(10)

    results = prefetch(make, range(10**9), ahead=5)
    next(results)
    assert threads()
    threading.Timer(0.2, released.set).start()
    results.close()
    assert wait_for(lambda: not threads())
    assert made in ([0], [0, 1])
