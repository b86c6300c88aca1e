"""Work in threads keeps its order, and ends at the first exception."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from utnetv2_fast.data.threads import available_cpus, map_in_threads
from utnetv2_fast.progress import silent


def test_results_are_in_the_order_of_the_items() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * 10

    seen = []

    def track(items: Sequence[object], description: str) -> Iterator[object]:
        assert (len(items), description) == (20, "Work")
        for item in items:
            seen.append(item)
            yield item

    assert map_in_threads(slow_first, range(20), track, "Work") == [item * 10 for item in range(20)]
    assert len(seen) == 20
    assert map_in_threads(slow_first, [], silent, "Work") == []


def test_the_first_exception_ends_the_work() -> None:
    begun = []
    release = threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise OSError("disk full")
        release.wait(0.05)

    with pytest.raises(OSError, match="disk full"):
        map_in_threads(work, range(1000), silent, "Work")
    assert len(begun) < 1000
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_there_is_a_processor() -> None:
    assert available_cpus() >= 1
