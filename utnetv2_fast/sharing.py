"""Work on many cases by all ranks of a job, which need nothing but a disk in common."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from utnetv2_fast.errors import RunError
from utnetv2_fast.locks import NoLocksError, try_lock
from utnetv2_fast.progress import Track, silent
from utnetv2_fast.ranks import Ranks

T = TypeVar("T")

_SECONDS_BETWEEN_LOOKS = 0.2


class ForEach(Protocol):
    def __call__(self, function: Callable[[T], bool], items: Sequence[T], /) -> list[bool]:
        """[function(item) for item in items], in order or in threads, with or without showing progress."""
        ...


def in_order(
    function: Callable[[T], bool], items: Sequence[T], /, track: Track = silent, description: str = ""
) -> list[bool]:
    """[function(item) for item in items], each after the one before it."""
    return [function(item) for item in track(items, description)]


def share(
    work: Callable[[T], object],
    items: Sequence[T],
    *,
    name: Callable[[T], str],
    finished: Callable[[T], bool],
    folder: Path,
    ranks: Ranks,
    for_each: ForEach,
) -> None:
    """Do `work(item)` for every item that is not `finished(item)`, each on one rank, and return when none is left.

    Whoever is free takes the next item, so that a slow rank holds nobody up. What a rank was at when it died is taken
    over by another one, with a warning; so are items whose work raised on another rank, which hence raises here too.

    Args:
        work: leaves something on the disk by which `finished` is true on every rank.
        name: of an item, unlike those of all others; names its lock in `folder`, made while it is needed.
        for_each: how the items are gone through.

    Raises RunError where the file system of `folder` has no locks, and what `work` raises.
    """
    if ranks.count == 1:

        def do(item: T) -> bool:
            work(item)
            return True

        for_each(do, [item for item in items if not finished(item)])
        return
    start = len(items) * ranks.rank // ranks.count  # each begins elsewhere, so that they seldom meet
    waiting = False

    def attempt(item: T) -> bool:
        """Whether the item is done with; False while another rank is at it."""
        if finished(item):
            return True
        with try_lock(folder / f"{name(item)}.lock") as mine:
            if mine and not finished(item):
                if waiting:
                    warnings.warn(
                        f"{name(item)}: the process that was at it ended without a result; this one takes it over.",
                        stacklevel=2,
                    )
                work(item)
            return mine

    def nobody_at(item: T) -> bool:
        with try_lock(folder / f"{name(item)}.lock") as free:
            return free

    try:
        left = [*items[start:], *items[:start]]
        while left:
            done = for_each(attempt, left)
            pending = [item for item, is_done in zip(left, done, strict=True) if not is_done]
            waiting, left = True, []
            while pending and not left:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                pending = [item for item in pending if not finished(item)]
                left = pending if any(nobody_at(item) for item in pending) else []
    except NoLocksError as error:
        raise RunError(f"{error}, which several processes need to share work; run a single one.") from None
    finally:
        with suppress(OSError):
            folder.rmdir()  # unless another rank still has locks in it
