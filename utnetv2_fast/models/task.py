"""What a dataset and a preset ask of any network that is to be trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Task(NamedTuple):
    """Input, output and sizes. `scales` of the four down-samplings and `kernel_sizes` of the five levels, per axis.

    `fields` are those of UTNetV2Config that the preset sets; rivals take from them what they have too.
    """

    dimensions: Literal[2, 3]
    in_channels: int
    num_classes: int
    patch_size: tuple[int, ...]
    scales: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    fields: Mapping[str, Any]
