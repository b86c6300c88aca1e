"""How the kernels of the normalisation walk over maps (B, C, *spatial) in any layout.

A tile is BC channels of BP positions of one sample, long in whichever of the two is contiguous: whole rows of
channels of a channels-last map, a stretch of the positions of a channels-first one. Positions count through the spatial
axes in their order; axes that every map has in one stretch are one axis, so that both of these layouts have just one.
"""

from __future__ import annotations

import functools
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
        return _maps(maps[0].shape, tuple(m.stride() for m in maps))

    def extent(self) -> tuple[int, int, int, int]:
        """What a kernel takes as C, P, H and W."""
        return (self.channels, self.positions, *self.sizes)

    def blocks(self, kernel: str, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
        """AXES, BC, BP and the warps of a program of `kernel`."""
        _, s_c, _, _, s_w = self.strides[0]
        channels_last = self.channels > 1 and (self.positions == 1 or 0 < s_c < s_w)
        channels, positions = power_of_two(self.channels), power_of_two(self.positions)
        elements = BYTES // dtype.itemsize
        if channels_last:
            BC = min(channels, CHANNELS_OF_A_ROW)
            BP = min(positions, elements // BC)
        else:
            BP = min(positions, elements)
            BC = min(channels, elements // BP)
        layout = "channels-last" if channels_last else "channels-first"
        key = f"{str(dtype).removeprefix('torch.')} {layout} axes={self.axes} {BC}x{BP}"
        by_rule = {"BC": BC, "BP": BP, "num_warps": 8}
        return {"AXES": self.axes, **tuned(kernel, device, key, by_rule)}

    def tiles(self, blocks: dict[str, int]) -> int:
        """How many tiles cover the maps."""
        return self.groups(blocks) * cdiv(self.positions, blocks["BP"])

    def groups(self, blocks: dict[str, int]) -> int:
        """How many blocks of channels all samples have together."""
        return self.batch * cdiv(self.channels, blocks["BC"])

    def split(self, blocks: dict[str, int], device: torch.device) -> tuple[int, int]:
        """(splits, steps): parts of the positions whose sums are taken apart, and the tiles of each.

        All parts of all groups are at most two programs per multiprocessor, unless the groups alone are more.
        """
        tiles = cdiv(self.positions, blocks["BP"])
        splits = max(1, min(tiles, 2 * multiprocessors(device) // self.groups(blocks)))
        steps = cdiv(tiles, splits)
        return cdiv(tiles, steps), steps


@functools.cache
def _maps(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Maps:
    axes: list[tuple[int, tuple[int, ...]]] = []  # size, strides of the maps
    for size, *steps in zip(shape[2:], *(of_map[2:] for of_map in strides), strict=True):
        if size == 1:
            continue
        joins = axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], steps, strict=True))
        axes.append((size * axes.pop()[0] if joins else size, tuple(steps)))
    padded = [(1, (0,) * len(strides))] * (3 - len(axes)) + axes
    batch, channels, *spatial = shape
    return Maps(
        batch=batch,
        channels=channels,
        positions=math.prod(spatial),
        axes=max(1, len(axes)),
        sizes=(padded[1][0], padded[2][0]),
        strides=tuple((*of_map[:2], *(steps[i] for _, steps in padded)) for i, of_map in enumerate(strides)),
    )


@triton.jit
def place(C, parts, BC: tl.constexpr):
    """Sample, channels (BC) and part of the positions of this program; neighbours differ in their channels."""
    i = tl.program_id(0).to(tl.int64)
    blocks_c = tl.cdiv(C, BC)
    o_c = (i % blocks_c) * BC + tl.arange(0, BC)
    i = i // blocks_c
    return i // parts, o_c, i % parts


@triton.jit
def offsets(i_b, o_c, o_p, H, W, s_x, AXES: tl.constexpr):
    """(BC, BP), where a map of strides s_x has the channels `o_c` at the positions `o_p`."""
    if AXES == 1:
        o_spatial = o_p * s_x[4]
    elif AXES == 2:
        o_spatial = (o_p // W) * s_x[3] + (o_p % W) * s_x[4]
    else:
        o_row = o_p // W
        o_spatial = (o_row // H) * s_x[2] + (o_row % H) * s_x[3] + (o_p % W) * s_x[4]
    return (i_b * s_x[0] + o_c * s_x[1])[:, None] + o_spatial[None, :]


@triton.jit
def load_of_channels(p_x, s_x, i_b, o_c, m_c):
    """What x (B, C) has for the channels `o_c` of a sample."""
    return tl.load(p_x + i_b * s_x[0] + o_c * s_x[1], mask=m_c, other=0)
