"""Bidirectional multi-head attention (B-MHA, paper Eq. 5) between a token map and a semantic map, and its block.

Token maps are (B, C, *spatial); semantic maps are (B, C, l): their tokens have no neighbourhood (every layer on them is
pointwise), so they carry no spatial axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utnetv2_fast import ops
from utnetv2_fast.nn.channels import halves
from utnetv2_fast.nn.convolution import (
    DepthwiseSeparableConv,
    MBConv,
    Norm,
    NormActConv,
    conv_of_norm,
    make_conv,
    make_norm,
)
from utnetv2_fast.nn.normalised_conv import fuses, through_moments
from utnetv2_fast.ops.dispatch import Impl


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H * d, *spatial) -> (B, H, n, d), a view: head h owns the channels h * d .. (h + 1) * d - 1."""
    return x.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


def merge_heads(x: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """(B, H, n, d) -> (B, H * d, *spatial), the inverse of `split_heads`."""
    return x.transpose(2, 3).flatten(1, 2).unflatten(2, spatial)


class RelativePositionBias(nn.Module):
    """A learnt bias of the scores for where a semantic token lies from a token: *spatial -> (H, n, l).

    The semantic map counts as a grid laid over the token map, and a token has the place of the cell it lies in; so the
    table is as large as the offsets between cells, whatever the size of the input.
    """

    def __init__(self, heads: int, map_size: tuple[int, ...]) -> None:
        super().__init__()
        self.map_size = map_size
        self.table = nn.Parameter(torch.empty(heads, *(2 * size - 1 for size in map_size)))  # (H, *offsets)
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, spatial: tuple[int, ...]) -> Tensor:
        bias, axes = self.table, len(spatial)
        for axis, (length, size) in enumerate(zip(spatial, self.map_size, strict=True)):
            cell = torch.arange(length, device=bias.device) * size // length
            offset = cell[:, None] - torch.arange(size, device=bias.device) + size - 1  # (length, size)
            # (H, .., offsets, ..) -> (H, .., length, size, ..): each axis becomes two.
            bias = bias.index_select(1 + 2 * axis, offset.flatten()).unflatten(1 + 2 * axis, (length, size))
        of_tokens, of_map = (tuple(range(first, 1 + 2 * axes, 2)) for first in (1, 2))
        return bias.permute(0, *of_tokens, *of_map).flatten(1, axes).flatten(2)


def biased_bidirectional_attention(
    q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.bidirectional_attention` with `bias` (H, n, l) added to the scores."""
    scores = q @ map_q.mT * q.shape[-1] ** -0.5 + bias  # (B, H, n, l)
    return scores.softmax(-1).to(v.dtype) @ map_v, scores.softmax(-2).to(v.dtype).mT @ v


class BidirectionalAttention(nn.Module):
    """Projections, B-MHA and output projections: (B, C_in, *spatial), (B, C, l) -> (B, C, *spatial), (B, C, l).

    The token map is projected depthwise-separably, the semantic map pointwise; query and key are one projection.
    With `update_map=False` the second result is None and its weights do not exist. With `positions`, the size of the
    semantic map as a grid laid over the token map, a learnt bias for each relative position is added to the scores; it
    runs in plain PyTorch, whatever `impl`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        heads: int,
        kernel_size: tuple[int, ...],
        *,
        update_map: bool = True,
        positions: tuple[int, ...] | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.impl: Impl = impl
        self.token_qv = DepthwiseSeparableConv(in_channels, 2 * channels, kernel_size, impl=impl)
        self.token_out = DepthwiseSeparableConv(channels, channels, kernel_size, impl=impl)
        self.map_qv = make_conv(channels, 2 * channels, (1,))
        self.map_out = make_conv(channels, channels, (1,)) if update_map else None
        self.bias = None if positions is None else RelativePositionBias(heads, positions)

    def forward(self, x: Tensor, semantic_map: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attend(self.token_qv(x), semantic_map)

    def attend(self, qv: Tensor, semantic_map: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same from the projected token map (B, 2 C, *spatial)."""
        q, v = (split_heads(t, self.heads) for t in halves(qv))
        map_q, map_v = (split_heads(t, self.heads) for t in self.map_qv(semantic_map).chunk(2, dim=1))
        if self.bias is None:
            out, map_out = ops.bidirectional_attention(
                q, v, map_q, map_v, need_map=self.map_out is not None, impl=self.impl
            )
        else:
            out, map_out = biased_bidirectional_attention(q, v, map_q, map_v, self.bias(tuple(qv.shape[2:])))
        out = self.token_out(merge_heads(out, tuple(qv.shape[2:])))
        if self.map_out is None or map_out is None:
            return out, None
        return out, self.map_out(merge_heads(map_out, tuple(semantic_map.shape[2:])))


class BidirectionalAttentionBlock(nn.Module):
    """Pre-norm B-MHA with residuals on both maps, then MBConv on the token map (paper Fig. 1B).

    (B, C_in, *spatial), (B, C, l) -> (B, C, *spatial), (B, C, l) or None with `update_map=False`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        heads: int,
        kernel_size: tuple[int, ...],
        expansion: int,
        norm: Norm,
        *,
        update_map: bool = True,
        positions: tuple[int, ...] | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        dimensions = len(kernel_size)
        self.token_norm = make_norm(norm, in_channels, dimensions)
        self.map_norm = make_norm(norm, channels, 1)
        self.attention = BidirectionalAttention(
            in_channels, channels, heads, kernel_size, update_map=update_map, positions=positions, impl=impl
        )
        self.impl: Impl = impl
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            pointwise = make_conv(in_channels, channels, (1,) * dimensions)
            self.shortcut = NormActConv(norm, in_channels, pointwise, dimensions=dimensions, impl=impl)
        self.feed_forward = MBConv(channels, kernel_size, expansion, norm, impl=impl)

    def forward(self, x: Tensor, semantic_map: Tensor) -> tuple[Tensor, Tensor | None]:
        semantic_map_ = self.map_norm(semantic_map)
        if fuses(self.token_norm, x, self.impl):
            x, moments = through_moments(self.token_norm, x, self.impl)
            qv = conv_of_norm(self.token_norm, self.attention.token_qv, x, moments, impl=self.impl)
            out, map_update = self.attention.attend(qv, semantic_map_)
            shortcut = self.shortcut.of_moments(x, moments) if isinstance(self.shortcut, NormActConv) else x
        else:
            out, map_update = self.attention(self.token_norm(x), semantic_map_)
            shortcut = self.shortcut(x)
        out = self.feed_forward(out + shortcut)
        return out, None if map_update is None else semantic_map + map_update
