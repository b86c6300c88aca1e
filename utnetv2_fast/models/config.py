"""What defines a network, checked when it is built, written into every run folder."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

LEVELS = 5  # resolutions of the U: full size, then four down-samplings
MOST_MAP_TOKENS = 4096  # the semantic map is tiny: the paper's largest has 64

Blocks = Annotated[int, Field(gt=0, le=64)]


class NetworkConfig(BaseModel):
    """What every network's configuration says; each adds its own. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    dimensions: Literal[2, 3]
    in_channels: PositiveInt
    num_classes: int = Field(ge=2, description="background included")
    impl: Literal["auto", "reference", "cpu", "triton"] = "auto"

    @property
    @abstractmethod
    def stride(self) -> tuple[int, ...]:
        """By how much each axis shrinks from the input to the lowest level."""

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """To what an input (*spatial) is padded: multiples of the stride, with more than one position left at the end.

        A single position has no variance for the norms there to divide by.
        """
        padded = [-(-n // s) * s for n, s in zip(size, self.stride, strict=True)]
        if all(n == s for n, s in zip(padded, self.stride, strict=True)):
            padded[-1] += self.stride[-1]
        return tuple(padded)


class FiveLevelConfig(NetworkConfig):
    """A U of five levels: level 0 is full resolution, level i follows the i-th down-sampling.

    The decoder mirrors the encoder.
    """

    channels: tuple[PositiveInt, ...] = Field(description="of levels 0 to 4")
    scales: tuple[tuple[Literal[1, 2], ...], ...] = Field(description="of the four down-samplings, per axis")
    kernel_sizes: tuple[tuple[PositiveInt, ...], ...] = Field(description="of levels 0 to 4, per axis, odd")
    norm: Literal["batch", "instance"]
    deep_supervision: bool = True

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(math.prod(axis) for axis in zip(*self.scales, strict=True))

    @model_validator(mode="after")
    def _levels_agree(self) -> FiveLevelConfig:
        per_axis = {"scales": (self.scales, LEVELS - 1), "kernel_sizes": (self.kernel_sizes, LEVELS)}
        for name, (rows, count) in per_axis.items():
            if len(rows) != count or any(len(row) != self.dimensions for row in rows):
                raise ValueError(f"{name} must be {count} tuples of {self.dimensions} numbers, got {rows}")
        if any(k % 2 == 0 for row in self.kernel_sizes for k in row):
            raise ValueError(f"kernel_sizes must be odd, got {self.kernel_sizes}")
        if len(self.channels) != LEVELS:
            raise ValueError(f"channels must be {LEVELS} numbers, got {self.channels}")
        return self


def check_map_size(map_size: tuple[int, ...], dimensions: int) -> None:
    """ValueError unless there are as many numbers as dimensions, and not too many tokens."""
    if len(map_size) != dimensions or math.prod(map_size) > MOST_MAP_TOKENS:
        raise ValueError(
            f"map_size must be {dimensions} numbers whose product is at most {MOST_MAP_TOKENS}, got {map_size}"
        )


class UTNetV2Config(FiveLevelConfig):
    """B-MHA works at levels 2, 3 and 4."""

    architecture: Literal["utnetv2"] = "utnetv2"
    blocks: tuple[Blocks, Blocks, Blocks] = Field(description="N1, N2, N3: B-MHA blocks of levels 2, 3, 4")
    heads: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="attention heads of levels 2, 3, 4")
    map_size: tuple[PositiveInt, ...] = Field(description="size of the semantic map; its product is l")
    expansion: PositiveInt = Field(description="widening of the MBConv feed-forward network")
    fusion_channels: PositiveInt
    fusion_heads: PositiveInt
    fusion_blocks: Blocks = 2
    reduce_skip: bool = Field(description="normalise and reduce each skip concatenation (the 2D networks do)")

    @property
    def map_tokens(self) -> int:
        """l, the number of semantic tokens of a level."""
        return math.prod(self.map_size)

    @model_validator(mode="after")
    def _sizes_agree(self) -> UTNetV2Config:
        check_map_size(self.map_size, self.dimensions)
        for channels, heads in zip(self.channels[2:], self.heads, strict=True):
            if channels % heads:
                raise ValueError(f"channels {self.channels[2:]} of levels 2 to 4 must divide by heads {self.heads}")
        if self.fusion_channels % self.fusion_heads:
            raise ValueError(f"fusion_channels {self.fusion_channels} must divide by fusion_heads {self.fusion_heads}")
        return self
