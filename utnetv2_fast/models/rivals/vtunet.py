"""VT-UNet (Peiris et al., 2022): a Swin U-Net of volumes whose decoder also attends to the encoder's keys and values.

Where the paper leaves it open, or its figure does not say:
* Merging and expanding leave the first axis alone, so the weights of a planar Swin fit every layer.
* A patch is as long along an axis as the preset's first two down-samplings make it: 1 x 4 x 4 where slices are thick,
  which is how the authors of UTNetV2 train it there, 4 x 4 x 4 elsewhere.
* The window is 7 along each axis; a shorter axis is one window. Smaller windows take the rows of the bias table that
  belong to their offsets.
* The two attentions of a decoder block share projections, bias and perceptron, weigh one half each, and the perceptron
  of a fixed encoding of positions is added (its equation 9), both scaled once by the root of the head's channels.
* A channel more or less only changes the first convolution: no volume is repeated to three channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from utnetv2_fast.models.config import Blocks, NetworkConfig
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.rivals.window_attention import (
    Expanding,
    Memory,
    PatchEmbedding,
    SwinBlock,
    SwinStage,
    drop_path_rates,
    initialise,
)
from utnetv2_fast.models.task import Task

_HEADS = (3, 6, 12, 24)
_PLANAR = (1, 2, 2)


class VTUNetConfig(NetworkConfig):
    """Every head has `width` channels, so a stage has 3, 6, 12 and 24 times as many."""

    architecture: Literal["vt-unet"] = "vt-unet"
    dimensions: Literal[3] = 3
    width: PositiveInt = Field(description="channels of an attention head; 32 published")
    depths: tuple[Blocks, Blocks, Blocks, Blocks] = Field(
        default=(2, 2, 2, 1), description="blocks of the encoder's stages; the decoder has those of the first three"
    )
    drop_path: float = Field(default=0.1, ge=0, lt=1, description="of the last block; rises from 0")
    patch: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="voxels of a token along each axis")

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(p * s**3 for p, s in zip(self.patch, _PLANAR, strict=True))


class VTUNet(SegmentationNetwork[VTUNetConfig]):
    """The encoder's parameters have the names of the published Swin-tiny; `layers_up.i` mirrors `layers.(3 - i)`."""

    def __init__(self, config: VTUNetConfig) -> None:
        super().__init__(config)
        channels = [heads * config.width for heads in _HEADS]
        rates = drop_path_rates(config.depths, config.drop_path)
        self.patch_embed = PatchEmbedding(config.in_channels, channels[0], config.patch)
        self.layers = nn.ModuleList(
            SwinStage(channels[i], _HEADS[i], 3, rates[i], merges=i < 3) for i in range(len(_HEADS))
        )
        self.norm = nn.LayerNorm(channels[3])
        self.layers_up = nn.ModuleList([Expanding(channels[3], channels[2], _PLANAR)])
        self.layers_up.extend(_UpStage(channels[i], _HEADS[i], rates[i], expands=i > 0) for i in (2, 1, 0))
        self.norm_up = nn.LayerNorm(channels[0])
        self.up = Expanding(channels[0], channels[0], config.patch)
        self.output = nn.Conv3d(channels[0], config.num_classes, 1, bias=False)
        self.apply(initialise)

    def forward_padded(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)  # (B, D, H, W, C)
        skips, memories = [], []
        for stage in self.layers:
            skips.append(x)
            x, memory = stage(x)
            memories.append(memory)
        first, *up_stages = self.layers_up
        x = first(self.norm(x))
        for stage, skip, memory in zip(up_stages, reversed(skips[:3]), reversed(memories[:3]), strict=True):
            x = stage(x, skip, memory)
        return self.output(self.up(self.norm_up(x)).movedim(-1, 1))


class _DecoderBlock(SwinBlock):
    """Attention to its own tokens and, beside it, to those of an encoder's block."""

    def forward_with(self, x: Tensor, memory: Memory) -> Tensor:
        own, encoded = self.attn.forward_with(self.norm1(x), memory)
        from_own, from_encoded = (self.perceive(x + self.drop_path(branch)) for branch in (own, encoded))
        positions = encode_positions(tuple(x.shape[1:-1]), x.shape[-1], x.device).to(x.dtype)
        return (from_own + from_encoded) / 2 + self.mlp(self.norm2(positions))


class _UpStage(nn.Module):
    """Joins the coarse tokens (B, D, H, W, C) with the skipped ones, then blocks, then expanding where there is one."""

    def __init__(self, channels: int, heads: int, drop_paths: list[float], *, expands: bool) -> None:
        super().__init__()
        self.join = nn.Linear(2 * channels, channels, bias=False)
        self.blocks = nn.ModuleList(
            _DecoderBlock(channels, heads, 3, shifted=i % 2 == 1, drop_path=rate) for i, rate in enumerate(drop_paths)
        )
        self.upsample = Expanding(channels, channels // 2, _PLANAR) if expands else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor, memories: Sequence[Memory]) -> Tensor:
        x = self.join(torch.cat((x, skip), dim=-1))
        for block, memory in zip(self.blocks, memories, strict=True):
            assert isinstance(block, _DecoderBlock)
            x = block.forward_with(x, memory)
        return self.upsample(x)


def encode_positions(size: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of each coordinate in an equal share of the channels, the last cut short: (*size, C)."""
    share = 2 * math.ceil(channels / (2 * len(size)))
    frequencies = 10000 ** -(torch.arange(0, share, 2, device=device) / share)
    parts = []
    for axis, n in enumerate(size):
        angles = torch.arange(n, device=device)[:, None] * frequencies  # (n, share / 2)
        part = torch.cat((angles.sin(), angles.cos()), dim=-1)
        part = part.view(*(n if i == axis else 1 for i in range(len(size))), share)
        parts.append(part.expand(*size, share))
    return torch.cat(parts, dim=-1)[..., :channels]


def configure_vt_unet(task: Task, width: int) -> VTUNetConfig:
    """As published at a width of 32."""
    depth, height, length = (a * b for a, b in zip(*task.scales[:2], strict=True))
    return VTUNetConfig(
        in_channels=task.in_channels, num_classes=task.num_classes, width=width, patch=(depth, height, length)
    )
