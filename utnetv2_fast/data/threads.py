"""Work on many cases at once, in threads: nibabel's decompression, scipy and torch release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from utnetv2_fast.progress import Track

T = TypeVar("T")
R = TypeVar("R")

# Every thread holds a scan and its resampled copies, up to some gigabytes for a large CT.
_MOST_THREADS = 8


def available_cpus() -> int:
    """The processors this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_threads(function: Callable[[T], R], items: Sequence[T], track: Track, description: str) -> list[R]:
    """[function(item) for item in items]; the first exception ends it, and items not begun are not begun."""
    with ThreadPoolExecutor(min(available_cpus(), _MOST_THREADS)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in track(futures, description)]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
