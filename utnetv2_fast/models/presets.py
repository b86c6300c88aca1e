"""The networks of the paper, their `-medformer` twins as the authors published them, and two small ones.

A preset holds everything but the channels of the input and the classes, and the input size it was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from utnetv2_fast.errors import InputError
from utnetv2_fast.models.task import Task


class Preset(NamedTuple):
    input_size: tuple[int, ...]
    fields: dict[str, Any]  # of UTNetV2Config, less in_channels and num_classes
    fits_data: bool = False  # scales, kernels and patch follow the dataset's plan instead

    @property
    def dimensions(self) -> Literal[2, 3]:
        return 2 if len(self.input_size) == 2 else 3

    def task(self, in_channels: int, num_classes: int, size: Sequence[int] | None = None) -> Task:
        """Its task where no plan decides scales and kernels; inputs have its own size unless another is given."""
        return Task(
            dimensions=self.dimensions,
            in_channels=in_channels,
            num_classes=num_classes,
            patch_size=tuple(size or self.input_size),
            scales=self.fields["scales"],
            kernel_sizes=self.fields["kernel_sizes"],
            fields=self.fields,
        )


def _planar(size: int, **fields: Any) -> Preset:
    defaults = {
        "dimensions": 2,
        "channels": (32, 64, 128, 256, 512),
        "scales": ((2, 2),) * 4,
        "kernel_sizes": ((3, 3),) * 5,
        "blocks": (2, 2, 2),
        "heads": (4, 8, 16),
        "expansion": 2,
        "norm": "batch",
        "fusion_channels": 512,
        "fusion_heads": 16,
        "reduce_skip": True,
    }
    return Preset((size, size), defaults | fields)


def _volumetric(input_size: tuple[int, int, int], **fields: Any) -> Preset:
    defaults = {
        "dimensions": 3,
        "channels": (32, 64, 128, 256, 320),
        "expansion": 4,
        "norm": "instance",
        "reduce_skip": False,
    }
    return Preset(input_size, defaults | fields)


# Thick slices: the first two levels neither shrink nor convolve across slices.
_THICK = {
    "scales": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    "kernel_sizes": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
}
_ISOTROPIC = {"scales": ((2, 2, 2),) * 4, "kernel_sizes": ((3, 3, 3),) * 5}
_ACDC_3D = {**_THICK, "blocks": (2, 2, 2), "heads": (4, 4, 4), "fusion_channels": 256, "fusion_heads": 4}
_BCV = {**_THICK, "blocks": (2, 4, 6), "heads": (4, 8, 10), "fusion_channels": 320, "fusion_heads": 10}
_LITS = {**_ISOTROPIC, "blocks": (2, 4, 6), "heads": (1, 1, 1), "fusion_channels": 320, "fusion_heads": 10}
_TINY = {
    "channels": (16, 32, 64, 96, 128),
    "blocks": (1, 1, 1),
    "heads": (2, 4, 4),
    "expansion": 2,
    "fusion_channels": 64,
    "fusion_heads": 4,
    "reduce_skip": True,  # a quarter of the time of a 3D training step would go into the concatenated channels
}

PRESETS: dict[str, Preset] = {
    "acdc-2d": _planar(256, map_size=(3, 3)),
    "acdc-2d-medformer": _planar(256, map_size=(3, 3)),
    "acdc-3d": _volumetric((16, 192, 192), **_ACDC_3D, map_size=(3, 3, 3)),
    "acdc-3d-medformer": _volumetric((16, 192, 192), **_ACDC_3D, map_size=(2, 6, 6)),
    "bcv-3d": _volumetric((32, 128, 128), **_BCV, map_size=(4, 4, 4)),
    "bcv-3d-medformer": _volumetric((32, 128, 128), **_BCV, map_size=(3, 3, 3)),
    "lits-3d": _volumetric((128, 128, 128), **_LITS, map_size=(4, 4, 4)),
    "lits-3d-medformer": _volumetric((128, 128, 128), **_LITS, map_size=(4, 4, 4), deep_supervision=False),
    "cardiac-2d": _planar(256, map_size=(4, 4)),
    "tiny-2d": _planar(128, **_TINY, map_size=(3, 3))._replace(fits_data=True),
    "tiny-3d": _volumetric((48, 48, 48), **_ISOTROPIC, **_TINY, map_size=(3, 3, 3))._replace(fits_data=True),
}


def get_preset(name: str) -> Preset:
    """The preset called `name`; InputError naming those there are."""
    if name not in PRESETS:
        raise InputError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
