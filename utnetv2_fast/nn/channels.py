"""Maps put together and taken apart along their channels, with gradients in the layout of the maps.

torch's own gradients of `cat`, `chunk` and strided slices are parts of larger maps, or channels-first whatever the
maps were; what lies in front then converts them, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def concatenate(x: Tensor, y: Tensor) -> Tensor:
    """(B, C_x, *spatial), (B, C_y, *spatial) -> (B, C_x + C_y, *spatial)."""
    return _Concatenate.apply(x, y)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2 C, *spatial) -> two views (B, C, *spatial)."""
    return _Halves.apply(x)


def merge_patches(x: Tensor, scale: Sequence[int], slowest_first: Sequence[int]) -> Tensor:
    """Neighbours become channels: (B, C, *spatial) -> (B, prod(scale) * C, *(spatial / scale)).

    Each of `scale` divides its axis. All channels of one neighbour lie together; `slowest_first` orders the spatial
    axes by how fast a neighbour's place along them changes from channel to channel.
    """
    axes, channels_last = len(scale), x.stride(1) == 1
    first = 1 if channels_last else 2  # spatial axis
    if channels_last:
        x = x.movedim(1, -1)
    for axis, size in enumerate(scale):
        x = x.unflatten(first + 2 * axis, (-1, size))  # (B, [C,] D', s_D, H', s_H, W', s_W[, C])
    positions = [first + 2 * axis for axis in range(axes)]
    offsets = [first + 2 * axis + 1 for axis in slowest_first]
    if channels_last:
        return x.permute(0, *positions, *offsets, -1).flatten(1 + axes).movedim(-1, 1)
    return x.permute(0, *offsets, 1, *positions).flatten(1, 1 + axes)


def _joined(x: Tensor, y: Tensor) -> Tensor:
    if x.stride(1) == 1 and y.stride(1) == 1:
        return torch.cat((x.movedim(1, -1), y.movedim(1, -1)), dim=-1).movedim(-1, 1)
    return torch.cat((x, y), dim=1)


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.channels = x.shape[1]
        return _joined(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        def of_its_own(part: Tensor) -> Tensor:
            return part.movedim(1, -1).contiguous().movedim(-1, 1) if grad.stride(1) == 1 else part.contiguous()

        return of_its_own(grad[:, : ctx.channels]), of_its_own(grad[:, ctx.channels :])


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> Tensor:
        return _joined(grad_first, grad_second)
