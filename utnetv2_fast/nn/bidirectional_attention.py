"""Bidirectional multi-head attention (B-MHA, paper Eq. 5) between a token map and a semantic map, and its block.

Token maps are (B, C, *spatial); semantic maps are (B, C, l): their tokens have no neighbourhood (every layer on them is
pointwise), so they carry no spatial axes.
"""

from __future__ import annotations

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


class BidirectionalAttention(nn.Module):
    """Projections, B-MHA and output projections: (B, C_in, *spatial), (B, C, l) -> (B, C, *spatial), (B, C, l).

    The token map is projected depthwise-separably, the semantic map pointwise; query and key are one projection.
    With `update_map=False` the second result is None and its weights do not exist.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        heads: int,
        kernel_size: tuple[int, ...],
        *,
        update_map: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.impl: Impl = impl
        self.token_qv = DepthwiseSeparableConv(in_channels, 2 * channels, kernel_size, impl=impl)
        self.token_out = DepthwiseSeparableConv(channels, channels, kernel_size, impl=impl)
        self.map_qv = make_conv(channels, 2 * channels, (1,))
        self.map_out = make_conv(channels, channels, (1,)) if update_map else None

    def forward(self, x: Tensor, semantic_map: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attend(self.token_qv(x), semantic_map)

    def attend(self, qv: Tensor, semantic_map: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same from the projected token map (B, 2 C, *spatial)."""
        q, v = (split_heads(t, self.heads) for t in halves(qv))
        map_q, map_v = (split_heads(t, self.heads) for t in self.map_qv(semantic_map).chunk(2, dim=1))
        out, map_out = ops.bidirectional_attention(
            q, v, map_q, map_v, need_map=self.map_out is not None, impl=self.impl
        )
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
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        dimensions = len(kernel_size)
        self.token_norm = make_norm(norm, in_channels, dimensions)
        self.map_norm = make_norm(norm, channels, 1)
        self.attention = BidirectionalAttention(
            in_channels, channels, heads, kernel_size, update_map=update_map, impl=impl
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
