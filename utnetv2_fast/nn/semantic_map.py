"""The life of a semantic map outside the attention: its generation from a token map and the fusion across scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast.nn.convolution import convolve, make_conv
from utnetv2_fast.ops.dispatch import Impl


class SemanticMapGeneration(nn.Module):
    """Pools a token map (B, C, *spatial) into l semantic tokens (B, C, l) by learnt weights (paper Fig. 8C).

    One convolution gives l weights per position, softmaxed over all positions; another the features they average.
    """

    def __init__(self, channels: int, map_tokens: int, kernel_size: tuple[int, ...], *, impl: Impl) -> None:
        super().__init__()
        self.impl: Impl = impl
        self.base = make_conv(channels, channels, kernel_size)
        self.weight = make_conv(channels, map_tokens, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        weight = convolve(self.weight, x, self.impl).flatten(2).softmax(dim=-1)  # (B, l, n)
        # (B, n, C): so its gradient is channels-last
        base = convolve(self.base, x, self.impl).flatten(2).transpose(1, 2)
        return (weight @ base).transpose(1, 2)


class _FusionBlock(nn.Module):
    """A conventional pre-norm Transformer block on tokens (B, t, C) whose perceptron does not widen."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.perceptron_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(tokens)).unflatten(-1, (3, self.heads, -1))  # (B, t, 3, H, d)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, t, d)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        return tokens + self.fc2(F.gelu(self.fc1(self.perceptron_norm(tokens))))


class SemanticMapFusion(nn.Module):
    """Full self-attention among the semantic tokens of all scales (paper Fig. 1C): [(B, C_i, l)] -> [(B, C_i, l)]."""

    def __init__(self, map_channels: Sequence[int], channels: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.project_in = nn.ModuleList(make_conv(c, channels, (1,)) for c in map_channels)
        self.blocks = nn.Sequential(*(_FusionBlock(channels, heads) for _ in range(blocks)))
        self.project_out = nn.ModuleList(make_conv(channels, c, (1,)) for c in map_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        projected = [project(m) for project, m in zip(self.project_in, maps, strict=True)]  # (B, C, l) each
        tokens = self.blocks(torch.cat(projected, dim=2).transpose(1, 2))  # (B, scales * l, C)
        fused = tokens.transpose(1, 2).chunk(len(projected), dim=2)
        return [project(m) for project, m in zip(self.project_out, fused, strict=True)]
