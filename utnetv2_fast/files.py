"""Writing files so that a reader never sees half of one, and reading them so that they cannot do harm."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from utnetv2_fast.errors import InputError

_UNFINISHED = ".unfinished-"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on any error it is removed.

    The temporary name keeps the suffixes of `path` (`.nii.gz`), because writers choose their format by them. Its
    content is on the disk before it takes the name: not even a power failure shows a reader half of it.

    Raises OSError, with `path` as its `filename`, when there is no room for it, say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:]) if path.name.endswith(".gz") else path.suffix
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_UNFINISHED}{path.name.split('.')[0]}.", suffix=suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file)
        # mkstemp makes private files; a result is as readable as any other file of this user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # writing to an open file does not name it
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_bounded(file: Path, most: int) -> bytes:
    """The content of a file; InputError, before any memory is taken, when it has more than `most` bytes."""
    size = file.stat().st_size
    if size > most:
        raise InputError(f"{file}: has {size} bytes, more than the {most} of any such file; restore it.")
    return file.read_bytes()


def lies_inside(folder: Path, file: Path) -> bool:
    """Whether `file` lies in `folder` once every `..` and link is followed; the folder itself may be a link."""
    # Not Path.resolve, which raises where links form a loop.
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


def digest(files: Iterable[Path]) -> str:
    """A digest (BLAKE2) of the contents of files in their order, whatever they are called."""
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        content = hashlib.blake2b(digest_size=16)
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                content.update(chunk)
        total.update(content.digest())
    return total.hexdigest()


def remove_unfinished(folder: Path) -> None:
    """Delete what writers that were killed left anywhere in `folder`, in which nobody else may be writing."""
    for file in folder.rglob(f"{_UNFINISHED}*"):
        file.unlink(missing_ok=True)
