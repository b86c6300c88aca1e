"""Locks between processes, also of machines that share a disk: files that the system frees when their holder dies."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class NoLocksError(Exception):
    """The system, or the file system, has no locks."""


@contextmanager
def try_lock(file: Path) -> Iterator[bool]:
    """Hold `file` until the block ends, and tell whether that succeeded: not while another holds it, in any process.

    The file exists while it is held and names the holder; one that a killed holder left is taken over. Threads count as
    others. Raises NoLocksError.
    """
    handle = _open_locked(file)
    if handle is None:
        yield False
        return
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield True
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def holder(file: Path) -> str:
    """Who holds the lock, for messages; "another process" where it does not say."""
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8") or "another process"
    return "another process"


def _open_locked(file: Path) -> int | None:
    """A handle of `file` that has its lock, or None where another one has it."""
    if fcntl is None:
        raise NoLocksError("this system has no flock")
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # somebody removed the folder just now
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # What was opened may since have been removed by its holder, and a new file locked by another.
            if os.fstat(handle).st_ino == file.stat().st_ino:
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                raise NoLocksError(f"{file.parent}: its file system has no locks ({error.strerror})") from None
            raise
        os.close(handle)
