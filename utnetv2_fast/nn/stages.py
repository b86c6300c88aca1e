"""The stages of the U: stem, patch merging, and the convolutional and attentive blocks of encoder and decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast.nn.bidirectional_attention import BidirectionalAttentionBlock
from utnetv2_fast.nn.channels import concatenate, merge_patches
from utnetv2_fast.nn.convolution import (
    DepthwiseSeparableConv,
    Norm,
    ResidualBlock,
    conv_of_norm,
    make_conv,
    make_norm,
)
from utnetv2_fast.nn.normalised_conv import fuses, through_moments
from utnetv2_fast.nn.semantic_map import SemanticMapGeneration
from utnetv2_fast.ops.dense_conv import in_layout_of
from utnetv2_fast.ops.dispatch import Impl


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """Bi- or trilinear interpolation, corners aligned, of x (B, C, *spatial) to the spatial size of `reference`."""
    return resize_to(x, tuple(reference.shape[2:]))


def resize_to(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The same to a size."""
    mode = {4: "bilinear", 5: "trilinear"}[x.ndim]
    return F.interpolate(x, size=size, mode=mode, align_corners=True)


def _reduced(norm: nn.Module, conv: nn.Module, x: Tensor, impl: Impl) -> Tensor:
    """`conv` of `norm` of x."""
    if not fuses(norm, x, impl):
        return conv(norm(x))
    x, moments = through_moments(norm, x, impl)
    return conv_of_norm(norm, conv, x, moments, impl=impl)


class Stem(nn.Module):
    """A convolution and a residual block at full resolution."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: tuple[int, ...], norm: Norm, *, impl: Impl = "auto"
    ) -> None:
        super().__init__()
        self.conv = make_conv(in_channels, channels, kernel_size)
        self.block = ResidualBlock(channels, channels, kernel_size, norm, impl=impl)

    def forward(self, x: Tensor) -> Tensor:
        # torch takes a single sample of a single channel for channels-first, whatever its strides.
        return self.block(in_layout_of(x, self.conv(x)))


class PatchMerging(nn.Module):
    """Halves the axes whose scale is 2: neighbours become channels, then norm and depthwise-separable projection.

    (B, C_in, *spatial) -> (B, C_out, *(size / scale)). The order of the merged channels is the authors': in 2D the row
    offset changes fastest, in 3D the column offset does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scale: tuple[int, ...],
        kernel_size: tuple[int, ...],
        norm: Norm,
        *,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.impl: Impl = impl
        merged = in_channels * math.prod(scale)
        self.norm = make_norm(norm, merged, len(scale))
        self.reduce = DepthwiseSeparableConv(merged, out_channels, kernel_size, impl=impl)

    def forward(self, x: Tensor) -> Tensor:
        slowest_first = (1, 0) if len(self.scale) == 2 else (0, 1, 2)
        return _reduced(self.norm, self.reduce, merge_patches(x, self.scale, slowest_first), self.impl)


class ConvDownStage(nn.Sequential):
    """Patch merging, then two residual blocks."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        scale: tuple[int, ...],
        kernel_size: tuple[int, ...],
        norm: Norm,
        *,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.patch_merging = PatchMerging(in_channels, channels, scale, kernel_size, norm, impl=impl)
        self.blocks = nn.Sequential(
            *(ResidualBlock(channels, channels, kernel_size, norm, impl=impl) for _ in range(2))
        )


class AttentionDownStage(nn.Module):
    """Patch merging, generation of the semantic map, B-MHA blocks: x -> (token map, semantic map)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        scale: tuple[int, ...],
        kernel_size: tuple[int, ...],
        norm: Norm,
        *,
        blocks: int,
        heads: int,
        map_tokens: int,
        expansion: int,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.patch_merging = PatchMerging(in_channels, channels, scale, kernel_size, norm, impl=impl)
        self.map_generation = SemanticMapGeneration(channels, map_tokens, kernel_size, impl=impl)
        self.blocks = nn.ModuleList(
            BidirectionalAttentionBlock(channels, channels, heads, kernel_size, expansion, norm, impl=impl)
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_merging(x)
        semantic_map = self.map_generation(x)
        for block in self.blocks:
            x, semantic_map = block(x, semantic_map)
        return x, semantic_map


class SkipConnection(nn.Module):
    """Resizes the coarse token map to the skipped one and concatenates them: -> (B, `out_channels`, *spatial of skip).

    The authors' 2D network normalises the result and reduces it to the stage's channels; their 3D network leaves that
    to the first block of the stage.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        channels: int,
        dimensions: int,
        norm: Norm,
        *,
        reduce: bool,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.impl: Impl = impl
        concatenated = in_channels + skip_channels
        self.norm = make_norm(norm, concatenated, dimensions) if reduce else nn.Identity()
        self.reduce = make_conv(concatenated, channels, (1,) * dimensions) if reduce else nn.Identity()
        self.out_channels = channels if reduce else concatenated

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return _reduced(self.norm, self.reduce, concatenate(resize_like(x, skip), skip), self.impl)


class ProjectedSkipConnection(nn.Module):
    """Projects the coarse token map to the channels of the skipped one, resizes and concatenates them.

    -> (B, 2 C_skip, *spatial of skip), the way of the authors' 2D ResUNet. The projection is linear and pointwise, so
    that in front of the resizing it gives the same, on fewer positions.
    """

    def __init__(self, in_channels: int, skip_channels: int, dimensions: int) -> None:
        super().__init__()
        self.project = make_conv(in_channels, skip_channels, (1,) * dimensions)
        self.out_channels = 2 * skip_channels

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return concatenate(resize_like(self.project(x), skip), skip)


class AttentionGate(nn.Module):
    """Scales each position of a skipped token map by what it and the coarser map say of it (Oktay et al. 2018).

    (B, C_coarse, *coarse), (B, C, *spatial) -> (B, C, *spatial).
    """

    def __init__(self, coarse_channels: int, channels: int, dimensions: int, norm: Norm) -> None:
        super().__init__()
        hidden, ones = max(channels // 2, 1), (1,) * dimensions
        self.coarse = make_conv(coarse_channels, hidden, ones)
        self.coarse_norm = make_norm(norm, hidden, dimensions)
        self.skip = make_conv(channels, hidden, ones)
        self.skip_norm = make_norm(norm, hidden, dimensions)
        self.gate = make_conv(hidden, 1, ones)
        self.gate_norm = make_norm(norm, 1, dimensions)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        coarse = self.coarse_norm(resize_like(self.coarse(x), skip))
        hidden = torch.relu(coarse + self.skip_norm(self.skip(skip)))
        return skip * torch.sigmoid(self.gate_norm(self.gate(hidden)))


class AttentionUpStage(nn.Module):
    """Skip connection for both maps, then B-MHA blocks: x, skip, map, skipped map -> (token map, map or None)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: tuple[int, ...],
        norm: Norm,
        *,
        blocks: int,
        heads: int,
        expansion: int,
        reduce_skip: bool,
        last_updates_map: bool,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        dimensions = len(kernel_size)
        self.skip = SkipConnection(in_channels, channels, channels, dimensions, norm, reduce=reduce_skip, impl=impl)
        self.map_reduce = make_conv(in_channels + channels, channels, (1,))
        self.blocks = nn.ModuleList(
            BidirectionalAttentionBlock(
                self.skip.out_channels if i == 0 else channels,
                channels,
                heads,
                kernel_size,
                expansion,
                norm,
                update_map=last_updates_map or i < blocks - 1,
                impl=impl,
            )
            for i in range(blocks)
        )

    def forward(self, x: Tensor, skip: Tensor, semantic_map: Tensor, skip_map: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.skip(x, skip)
        semantic_map = self.map_reduce(torch.cat([semantic_map, skip_map], dim=1))
        for block in self.blocks:
            x, semantic_map = block(x, semantic_map)
        return x, semantic_map


class ConvUpStage(nn.Module):
    """Skip connection, then two residual blocks."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: tuple[int, ...],
        norm: Norm,
        *,
        reduce_skip: bool,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.skip = SkipConnection(
            in_channels, channels, channels, len(kernel_size), norm, reduce=reduce_skip, impl=impl
        )
        self.blocks = nn.Sequential(
            ResidualBlock(self.skip.out_channels, channels, kernel_size, norm, impl=impl),
            ResidualBlock(channels, channels, kernel_size, norm, impl=impl),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.blocks(self.skip(x, skip))
