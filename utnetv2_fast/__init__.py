"""UTNetV2 for medical scans: operators, models, and the whole way from a scan to its segmentation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utnetv2_fast.inference.predict import predict
    from utnetv2_fast.memory import keep_freed_memory
    from utnetv2_fast.models import UTNetV2, UTNetV2Config
    from utnetv2_fast.ops import (
        bidirectional_attention,
        dense_conv,
        depthwise_conv,
        depthwise_separable_conv,
        explain,
    )

__version__ = "0.1.0"

__all__ = [
    "UTNetV2",
    "UTNetV2Config",
    "__version__",
    "bidirectional_attention",
    "dense_conv",
    "depthwise_conv",
    "depthwise_separable_conv",
    "explain",
    "keep_freed_memory",
    "predict",
]

# Loaded when first asked for, because torch takes a second to import and `utnetv2-fast --help` needs none of it.
_HOMES = {
    "UTNetV2": "utnetv2_fast.models",
    "UTNetV2Config": "utnetv2_fast.models",
    "bidirectional_attention": "utnetv2_fast.ops",
    "dense_conv": "utnetv2_fast.ops",
    "depthwise_conv": "utnetv2_fast.ops",
    "depthwise_separable_conv": "utnetv2_fast.ops",
    "explain": "utnetv2_fast.ops",
    "keep_freed_memory": "utnetv2_fast.memory",
    "predict": "utnetv2_fast.inference.predict",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
