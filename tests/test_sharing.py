"""Ranks that share work leave nothing out, do nothing twice, and replace one that dies. Threads stand for ranks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from utnetv2_fast import locks
from utnetv2_fast.errors import InputError, RunError
from utnetv2_fast.locks import try_lock
from utnetv2_fast.ranks import ALONE, Ranks
from utnetv2_fast.sharing import in_order, share

Work = Callable[[Path], None]


def do_all(folder: Path, items: Sequence[int], ranks: Ranks, work: Work) -> None:
    """Item i is finished when the file `folder/i` exists."""
    share(
        lambda i: work(folder / str(i)),
        items,
        name=str,
        finished=lambda i: (folder / str(i)).exists(),
        folder=folder / ".locks",
        ranks=ranks,
        for_each=in_order,
    )


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 3, 40])
def test_each_item_is_done_once_and_all_return_when_all_are_done(tmp_path: Path, count: int, items: int) -> None:
    done: list[str] = []

    def work(file: Path) -> None:
        time.sleep(0.002)
        done.append(file.name)
        file.touch()

    def rank(number: int) -> int:
        do_all(tmp_path, range(items), Ranks(number, count, number), work)
        return len([file for file in tmp_path.iterdir() if file.is_file()])

    with ThreadPoolExecutor(count) as pool:
        assert list(pool.map(rank, range(count))) == [items] * count
    assert Counter(done) == Counter(map(str, range(items)))
    assert not (tmp_path / ".locks").exists()


def test_the_work_is_divided(tmp_path: Path) -> None:
    workers: Counter[int] = Counter()

    def rank(number: int) -> None:
        def work(file: Path) -> None:
            time.sleep(0.01)
            workers[number] += 1
            file.touch()

        do_all(tmp_path, range(30), Ranks(number, 3, number), work)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(rank, range(3)))
    assert sum(workers.values()) == 30
    assert min(workers.values()) >= 5


def test_what_is_finished_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    done = []
    for ranks in (ALONE, Ranks(1, 2, 0)):
        do_all(tmp_path, range(3), ranks, lambda file: (done.append(file.name), file.touch())[1])
    assert done == ["0", "2"]


def test_a_rank_that_never_comes_is_not_waited_for(tmp_path: Path) -> None:
    do_all(tmp_path, range(4), Ranks(3, 9, 0), Path.touch)
    assert sorted(file.name for file in tmp_path.iterdir()) == list("0123")


def test_what_a_rank_was_at_when_it_died_is_taken_over_and_named(tmp_path: Path) -> None:
    held, died = threading.Event(), threading.Event()

    def hold_and_die() -> None:
        with try_lock(tmp_path / ".locks" / "2.lock") as mine:
            assert mine
            held.set()
            died.wait(10)

    other = threading.Thread(target=hold_and_die)
    other.start()
    held.wait(10)
    threading.Timer(0.3, died.set).start()
    began = time.monotonic()
    with pytest.warns(UserWarning, match="2: the process that was at it"):
        do_all(tmp_path, range(4), Ranks(0, 2, 0), Path.touch)
    other.join()
    assert time.monotonic() - began > 0.25
    assert (tmp_path / "2").exists()


def test_what_work_raises_is_raised_on_every_rank(tmp_path: Path) -> None:
    def work(file: Path) -> None:
        if file.name == "1":
            raise InputError("scan 1 is damaged")
        file.touch()

    for number in range(2):
        with pytest.raises(InputError, match="scan 1"):
            do_all(tmp_path, range(3), Ranks(number, 2, 0), work)
    with try_lock(tmp_path / ".locks" / "1.lock") as free:
        assert free


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    do_all(tmp_path, range(2), ALONE, Path.touch)
    with pytest.raises(RunError, match="run a single one"):
        do_all(tmp_path, range(3), Ranks(0, 2, 0), Path.touch)
