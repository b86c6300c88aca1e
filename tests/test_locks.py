"""A lock has one holder among all processes and threads, says who, and dies with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utnetv2_fast import locks
from utnetv2_fast.locks import NoLocksError, holder, try_lock

HOLD = """
import sys, time
from pathlib import Path
from utnetv2_fast.locks import try_lock
with try_lock(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lock"
    with try_lock(file) as mine:
        assert mine
        assert f"process {os.getpid()}" in holder(file)
        with try_lock(file) as second:
            assert not second
    assert not file.exists()
    with try_lock(file) as mine:
        assert mine


def test_a_killed_holder_frees_it(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, file], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        assert f"process {process.pid} on " in holder(file)
        with try_lock(file) as mine:
            assert not mine
    finally:
        process.kill()
        process.wait()
    assert file.exists()
    with try_lock(file) as mine:
        assert mine


def test_many_threads_never_hold_it_together(tmp_path: Path) -> None:
    """The file is removed and made anew all the time."""
    file, inside, together, times = tmp_path / "lock", [], [], []

    def work() -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            with try_lock(file) as mine:
                if mine:
                    inside.append(1)
                    together.append(len(inside))
                    inside.pop()
                    times.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) > 10
    assert set(together) == {1}


def test_a_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(NoLocksError), try_lock(tmp_path / "lock"):
        pass


def test_who_holds_it_may_be_unknown(tmp_path: Path) -> None:
    assert holder(tmp_path / "nowhere") == "another process"
