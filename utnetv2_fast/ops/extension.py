"""The C++ extension, loaded when first asked for and after torch, so that both use one OpenMP runtime."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch  # noqa: F401  (its OpenMP runtime must be there before the extension looks for one)


@functools.cache
def load_extension() -> ModuleType | None:
    """`utnetv2_fast._C`, or None where it was not built; one that is there but does not load warns, once."""
    try:
        return importlib.import_module("utnetv2_fast._C")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(f"the C++ extension of utnetv2_fast does not load: {error}", RuntimeWarning, stacklevel=2)
        return None
