"""Reading archives of tensors that others may have written: no code in them is run, and none swells in memory."""

from __future__ import annotations

import errno
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch

# What zipfile, torch and NumPy raise for a file that is no archive, or holds something else than tensors; and PyYAML
# for tags that do not fit their values.
DAMAGE = (
    *(BadZipFile, UnpicklingError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError),
    *(NotImplementedError, OverflowError, MemoryError, RecursionError),
)


def read_torch_archive(file: Path) -> Any:
    """What `torch.save` wrote, tensors on the CPU; None when the file is damaged or none such. OSError as it comes."""
    try:
        # By way of the CPU: a GPU would keep an optimiser's step counters, and every step would wait for each.
        return torch.load(file, map_location="cpu", weights_only=True) if _is_whole(file) else None
    except DAMAGE:
        return None


def read_numpy_archive(file: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """The arrays that `np.savez` wrote; None when the file is damaged or none such. OSError as it comes."""
    try:
        if not _is_whole(file):
            return None
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except DAMAGE:
        return None


def _is_whole(file: Path) -> bool:
    """Whether it has the checksums it claims, which torch and NumPy do not compare.

    Nor do they compress: an archive that does, or whose parts overlap, is made to swell.
    """
    try:
        with ZipFile(file) as archive:
            parts = archive.infolist()
            stored = all(part.compress_type == ZIP_STORED for part in parts)
            swelling = not stored or sum(part.file_size for part in parts) > file.stat().st_size
            return not swelling and archive.testzip() is None
    except OSError as error:
        if error.errno != errno.EINVAL:  # what zipfile meets where a damaged directory leads before the file
            raise
        return False
