"""How the kernels of the normalisation walk over maps (B, C, *spatial) in any layout.

A tile is BLOCK_C channels of BLOCK_P positions of one sample, long in whichever of the two is contiguous: whole rows of
channels of a channels-last map, a stretch of the positions of a channels-first one. Positions count through the spatial
axes in their order; axes that every map has in one stretch are one axis, so that both of these layouts have just one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from utnetv2_fast.kernels.launch import cdiv, multiprocessors, power_of_two, tuned

BYTES = 8192  # of a tile: two loads of 16 bytes for each thread of 8 warps
CHANNELS_OF_A_ROW = 64  # of a channels-last tile: at least a cache line
STAGES = 3  # of a loop over tiles: two are on their way while one is computed on


@dataclass(frozen=True)
class Maps:
    """Maps of one shape, the first of which decides the tiles."""

    batch: int
    channels: int
    positions: int
    axes: int  # spatial ones that are left
    sizes: tuple[int, int]  # of the last two axes
    strides: tuple[tuple[int, ...], ...]  # per map, of batch, channel and three axes

    @classmethod
    def of(cls, *maps: Tensor) -> Maps:
        axes: list[tuple[int, tuple[int, ...]]] = []  # size, strides of the maps
        for size, *strides in zip(maps[0].shape[2:], *(m.stride()[2:] for m in maps), strict=True):
            if size == 1:
                continue
            joins = axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], strides, strict=True))
            axes.append((size * axes.pop()[0] if joins else size, tuple(strides)))
        padded = [(1, (0,) * len(maps))] * (3 - len(axes)) + axes
        batch, channels, *spatial = maps[0].shape
        return cls(
            batch=batch,
            channels=channels,
            positions=math.prod(spatial),
            axes=max(1, len(axes)),
            sizes=(padded[1][0], padded[2][0]),
            strides=tuple((*m.stride()[:2], *(strides[i] for _, strides in padded)) for i, m in enumerate(maps)),
        )

    def arguments(self) -> tuple[int, ...]:
        """What a kernel takes as channels, positions, height and width and then, map by map, strides."""
        return (self.channels, self.positions, *self.sizes, *(s for strides in self.strides for s in strides))

    def blocks(self, kernel: str, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
        """AXES, BLOCK_C, BLOCK_P and the warps of a program of `kernel`."""
        _, s_c, _, _, s_w = self.strides[0]
        channels_last = self.channels > 1 and (self.positions == 1 or 0 < s_c < s_w)
        channels, positions = power_of_two(self.channels), power_of_two(self.positions)
        elements = BYTES // dtype.itemsize
        if channels_last:
            block_c = min(channels, CHANNELS_OF_A_ROW)
            block_p = min(positions, elements // block_c)
        else:
            block_p = min(positions, elements)
            block_c = min(channels, elements // block_p)
        layout = "channels-last" if channels_last else "channels-first"
        key = f"{str(dtype).removeprefix('torch.')} {layout} {block_c}x{block_p}"
        by_rule = {"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": 8}
        return {"AXES": self.axes, **tuned(kernel, device, key, by_rule)}

    def tiles(self, blocks: dict[str, int]) -> int:
        """How many tiles cover the maps."""
        return self.groups(blocks) * cdiv(self.positions, blocks["BLOCK_P"])

    def groups(self, blocks: dict[str, int]) -> int:
        """How many blocks of channels all samples have together."""
        return self.batch * cdiv(self.channels, blocks["BLOCK_C"])

    def split(self, blocks: dict[str, int], device: torch.device) -> tuple[int, int]:
        """(splits, steps): parts of the positions whose sums are taken apart, and the tiles of each.

        All parts of all groups are at most two programs per multiprocessor, unless the groups alone are more.
        """
        tiles = cdiv(self.positions, blocks["BLOCK_P"])
        splits = max(1, min(tiles, 2 * multiprocessors(device) // self.groups(blocks)))
        steps = cdiv(tiles, splits)
        return cdiv(tiles, steps), steps


@triton.jit
def place(channels, parts, BLOCK_C: tl.constexpr):
    """Sample, channels (BLOCK_C) and part of the positions of this program; neighbours differ in their channels."""
    i = tl.program_id(0).to(tl.int64)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    o_c = (i % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = i // blocks_c
    return i // parts, o_c, i % parts


@triton.jit
def offsets(i_b, o_c, o_p, height, width, s_b, s_c, s_d, s_h, s_w, AXES: tl.constexpr):
    """(BLOCK_C, BLOCK_P), where a map has the channels `o_c` at the positions `o_p`."""
    if AXES == 1:
        o_spatial = o_p * s_w
    elif AXES == 2:
        o_spatial = (o_p // width) * s_h + (o_p % width) * s_w
    else:
        o_row = o_p // width
        o_spatial = (o_row // height) * s_d + (o_row % height) * s_h + (o_p % width) * s_w
    return (i_b * s_b + o_c * s_c)[:, None] + o_spatial[None, :]
