"""Swin's attention within windows that are shifted from block to block (Liu et al., 2021), in 2D and 3D.

Token maps are (B, *spatial, C) here. Their size need be no multiple of the window: they are padded to one, and no token
attends to padding or across the edge over which a shift wraps. Along an axis that is no longer than the window there is
one window, as long as the axis, and no shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast.models.rivals.layers import Perceptron, StochasticDepth

WINDOW = 7  # tokens along an axis


class Windows(NamedTuple):
    """How token maps of a `size` are cut: into windows, each of N tokens, after a cyclic shift; all per axis."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]

    @property
    def padding(self) -> tuple[int, ...]:
        return tuple(-n % w for n, w in zip(self.size, self.window, strict=True))

    @property
    def grid(self) -> tuple[int, ...]:
        """Windows along each axis."""
        return tuple(-(-n // w) for n, w in zip(self.size, self.window, strict=True))

    def cut(self, x: Tensor) -> Tensor:
        """(B, *spatial, C) -> (B * windows, N, C)."""
        return self._cut(F.pad(x, (0, 0, *(amount for p in reversed(self.padding) for amount in (0, p)))))

    def _cut(self, x: Tensor) -> Tensor:
        axes = len(self.size)
        x = x.roll([-s for s in self.shift], dims=list(range(1, axes + 1)))
        for axis, window in enumerate(self.window):
            x = x.unflatten(1 + 2 * axis, (-1, window))  # (B, D / w, w, H / w, w, .., C)
        x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), -1)
        return x.flatten(axes + 1, 2 * axes).flatten(0, axes)

    def join(self, x: Tensor) -> Tensor:
        """(B * windows, N, C) -> (B, *spatial, C), the inverse of `cut`."""
        axes = len(self.size)
        x = x.unflatten(0, (-1, *self.grid)).unflatten(axes + 1, self.window)
        x = x.permute(0, *(place for axis in range(1, axes + 1) for place in (axis, axes + axis)), -1)
        for axis in range(1, axes + 1):
            x = x.flatten(axis, axis + 1)
        x = x.roll(self.shift, dims=list(range(1, axes + 1)))
        crop = (slice(None), *(slice(n) for n in self.size))
        return x[crop]

    def separated(self, device: torch.device) -> Tensor | None:
        """Which tokens of a window must not see each other, (windows, N, N); None where all may."""
        if not any(self.shift) and not any(self.padding):
            return None
        region = torch.zeros((1,) * len(self.size), dtype=torch.long, device=device)
        for axis, (n, p, s) in enumerate(zip(self.size, self.padding, self.shift, strict=True)):
            place = torch.arange(n + p, device=device)
            kind = (place < s).long() + 2 * (place >= n)  # wrapped by the shift, or padding
            region = 3 * region + kind.view([-1 if i == axis else 1 for i in range(len(self.size))])
        regions = self._cut(region[None, ..., None]).squeeze(-1)  # (windows, N)
        return regions[:, :, None] != regions[:, None, :]


def windows_for(size: tuple[int, ...], *, shifted: bool) -> Windows:
    """The windows for token maps of this size."""
    window = tuple(min(n, WINDOW) for n in size)
    return Windows(size, window, tuple(WINDOW // 2 if shifted and n > WINDOW else 0 for n in size))


def relative_positions(window: tuple[int, ...], device: torch.device) -> Tensor:
    """Which row of a bias table each pair of tokens in a window takes, (N, N), as the published weights order them."""
    places = torch.stack(torch.meshgrid(*(torch.arange(w, device=device) for w in window), indexing="ij")).flatten(1)
    index = torch.zeros((), dtype=torch.long, device=device)
    for place in places:
        index = index * (2 * WINDOW - 1) + place[:, None] - place[None, :] + WINDOW - 1
    return index


class Memory(NamedTuple):
    """Keys and values of an encoder's windows for the decoder's: (B * windows, H, N, d) each."""

    k: Tensor
    v: Tensor


class WindowAttention(nn.Module):
    """Multi-head attention in windows with a learnt bias for every relative position: (B, *spatial, C) -> the same."""

    def __init__(self, channels: int, heads: int, dimensions: int, *, shifted: bool) -> None:
        super().__init__()
        self.heads = heads
        self.shifted = shifted
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** dimensions, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Memory]:
        """The result, and the keys and values that it was made of."""
        windows, q, own, bias = self._project(x)
        return self._attend(windows, q, own, bias), own

    def forward_with(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """What the queries of x find in x, and what they find in `memory`, of a map of the same size."""
        windows, q, own, bias = self._project(x)
        return self._attend(windows, q, own, bias), self._attend(windows, q, memory, bias)

    def _project(self, x: Tensor) -> tuple[Windows, Tensor, Memory, Tensor]:
        windows = windows_for(tuple(x.shape[1:-1]), shifted=self.shifted)
        qkv = self.qkv(windows.cut(x)).unflatten(2, (3, self.heads, -1))  # (B * windows, N, 3, H, d)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B * windows, H, N, d) each
        return windows, q, Memory(k, v), self._bias(windows, len(x))

    def _bias(self, windows: Windows, batch: int) -> Tensor:
        """Added to the scores: (1 or B * windows, H, N, N)."""
        index = relative_positions(windows.window, self.relative_position_bias_table.device)
        # As an embedding: unlike that of indexing, its gradient is the same from run to run on a GPU.
        bias = F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)[None]  # (1, H, N, N)
        separated = windows.separated(bias.device)
        if separated is None:
            return bias
        return bias.masked_fill(separated[:, None], -math.inf).repeat(batch, 1, 1, 1)

    def _attend(self, windows: Windows, q: Tensor, memory: Memory, bias: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, memory.k, memory.v, attn_mask=bias.to(q.dtype))
        return windows.join(self.proj(out.transpose(1, 2).flatten(2)))


class SwinBlock(nn.Module):
    """Pre-norm window attention and perceptron: (B, *spatial, C) -> the same, and the keys and values for a decoder."""

    def __init__(self, channels: int, heads: int, dimensions: int, *, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, dimensions, shifted=shifted)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Perceptron(channels, 4 * channels)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Memory]:
        attended, memory = self.attn(self.norm1(x))
        return self.perceive(x + self.drop_path(attended)), memory

    def perceive(self, x: Tensor) -> Tensor:
        """The second half of the block."""
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PlanarMerging(nn.Module):
    """Halves the last two axes and doubles the channels: (B, [D,] H, W, C) -> (B, [D,] H / 2, W / 2, 2 C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        neighbours = (
            x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)
        )  # as in the published weights
        return self.reduction(self.norm(torch.cat(list(neighbours), dim=-1)))


class Expanding(nn.Module):
    """Channels become neighbours: (B, *spatial, C) -> (B, *(spatial * scale), `out_channels`), normalised."""

    def __init__(self, channels: int, out_channels: int, scale: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(channels, math.prod(scale) * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.scale)
        x = self.expand(x).unflatten(-1, (*self.scale, -1))  # (B, D, H, .., s_D, s_H, .., C)
        x = x.permute(0, *(place for axis in range(1, axes + 1) for place in (axis, axes + axis)), -1)
        for axis in range(1, axes + 1):
            x = x.flatten(axis, axis + 1)
        return self.norm(x)


class PatchEmbedding(nn.Module):
    """Patches become tokens: (B, C_in, *spatial) -> (B, *(spatial / patch), C)."""

    def __init__(self, in_channels: int, channels: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        conv: Callable[..., nn.Module] = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.proj = conv(in_channels, channels, patch, patch)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).movedim(1, -1))


class SwinStage(nn.Module):
    """Blocks, every second one shifted, then the merging where there is one."""

    def __init__(self, channels: int, heads: int, dimensions: int, drop_paths: list[float], *, merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(channels, heads, dimensions, shifted=i % 2 == 1, drop_path=rate)
            for i, rate in enumerate(drop_paths)
        )
        self.downsample = PlanarMerging(channels) if merges else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Memory]]:
        """Also the keys and values of every block."""
        memories = []
        for block in self.blocks:
            x, memory = block(x)
            memories.append(memory)
        return self.downsample(x), memories


def initialise(module: nn.Module) -> None:
    """Swin's own rule for every module of a network, to be given to `apply`; torch's layer norms begin so anyway."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(depths: tuple[int, ...], last: float) -> list[list[float]]:
    """For every block of stages of these depths: from 0 in the first rising evenly to `last`."""
    rates = torch.linspace(0, last, sum(depths), device="cpu").tolist()
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [rates[end - depth : end] for depth, end in zip(depths, ends, strict=True)]
