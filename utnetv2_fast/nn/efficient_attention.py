"""What B-MHA is compared with: efficient attention of UTNetV1 (paper Eq. 4), and no attention at all.

Both take and give a token map (B, C, *spatial) alone, and fill the place of B-MHA in a pre-norm block. The former also
joins coarse and skipped token maps in UTNetV1.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast import ops
from utnetv2_fast.nn.bidirectional_attention import merge_heads, split_heads
from utnetv2_fast.nn.channels import concatenate, halves
from utnetv2_fast.nn.convolution import (
    DepthwiseSeparableConv,
    MBConv,
    Norm,
    NormActConv,
    Perceptron,
    make_conv,
    make_norm,
)
from utnetv2_fast.nn.stages import resize_like, resize_to
from utnetv2_fast.ops.dispatch import Impl

Reduction = Literal["area", "linear"]


class EfficientAttention(nn.Module):
    """Every token attends to keys and values reduced to a map of `map_size`: (B, C_in, *spatial) -> (B, C, *spatial).

    With `source_channels` the keys and values are those of another map, which has so many.
    They are reduced by interpolation, over areas or, as UTNetV1 does, linearly between neighbours, corners aligned. The
    latter reads a few positions of a large map and leaves the others out: of one reduced to two per axis, all but the
    corners. Projections are pointwise, or depthwise-separable with `convolve`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        heads: int,
        kernel_size: tuple[int, ...],
        map_size: tuple[int, ...],
        *,
        source_channels: int | None = None,
        reduction: Reduction = "area",
        convolve: bool,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.map_size = map_size
        self.reduction: Reduction = reduction
        self.impl: Impl = impl

        def project(inputs: int, outputs: int) -> nn.Module:
            if convolve:
                return DepthwiseSeparableConv(inputs, outputs, kernel_size, impl=impl)
            return make_conv(inputs, outputs, (1,) * len(kernel_size))

        self.q = project(in_channels, channels)
        self.kv = project(source_channels or in_channels, 2 * channels)
        self.out = project(channels, channels)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        q = split_heads(self.q(x), self.heads)
        reduced = self._reduce(self.kv(x if source is None else source))
        k, v = (split_heads(t, self.heads) for t in reduced.chunk(2, dim=1))
        out, _ = ops.bidirectional_attention(q, q, k, v, need_map=False, impl=self.impl)
        return self.out(merge_heads(out, tuple(x.shape[2:])))

    def _reduce(self, kv: Tensor) -> Tensor:
        if self.reduction == "area":
            return F.interpolate(kv, size=self.map_size, mode="area")
        return resize_to(kv, self.map_size)


class AttendingSkipConnection(nn.Module):
    """UTNetV1's: the skipped tokens attend to the coarse map, beside its projection, then a perceptron; concatenated.

    (B, C_coarse, *coarse), (B, C, *spatial) -> (B, 2 C, *spatial).
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        heads: int,
        map_size: tuple[int, ...],
        expansion: int,
        norm: Norm,
        *,
        reduction: Reduction,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        dimensions = len(map_size)
        ones = (1,) * dimensions
        self.coarse_norm = make_norm(norm, in_channels, dimensions)
        self.skip_norm = make_norm(norm, skip_channels, dimensions)
        self.project = make_conv(in_channels, skip_channels, ones, bias=True)
        self.attention = EfficientAttention(
            skip_channels,
            skip_channels,
            heads,
            ones,
            map_size,
            source_channels=in_channels,
            reduction=reduction,
            convolve=False,
            impl=impl,
        )
        self.feed_forward = Perceptron(skip_channels, dimensions, expansion, norm)
        self.out_channels = 2 * skip_channels

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        attended = self.attention(self.skip_norm(skip), self.coarse_norm(x))
        return concatenate(self.feed_forward(attended + resize_like(self.project(x), skip)), skip)


class IdentityAttention(nn.Module):
    """The projections of B-MHA on the token map with nothing mixed between them: (B, C_in, ..) -> (B, C, ..).

    What would be queries and what would be values are added, so that both are trained.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: tuple[int, ...], *, impl: Impl = "auto") -> None:
        super().__init__()
        self.token_qv = DepthwiseSeparableConv(in_channels, 2 * channels, kernel_size, impl=impl)
        self.token_out = DepthwiseSeparableConv(channels, channels, kernel_size, impl=impl)

    def forward(self, x: Tensor) -> Tensor:
        q, v = halves(self.token_qv(x))
        return self.token_out(q + v)


class TokenBlock(nn.Module):
    """Pre-norm `attention` on the token map with a residual, then `feed_forward`, which has one of its own.

    The block of B-MHA without the semantic map: (B, C_in, *spatial) -> (B, C, *spatial).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        attention: EfficientAttention | IdentityAttention,
        feed_forward: MBConv | Perceptron,
        dimensions: int,
        norm: Norm,
        *,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, in_channels, dimensions)
        self.attention = attention
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            pointwise = make_conv(in_channels, channels, (1,) * dimensions)
            self.shortcut = NormActConv(norm, in_channels, pointwise, dimensions=dimensions, impl=impl)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.attention(self.norm(x)) + self.shortcut(x))
