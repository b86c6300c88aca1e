"""SwinUNet (Cao et al., 2021): the Swin-tiny Transformer as encoder, the same mirrored with patch expanding as decoder.

An image of a single channel is repeated to three, which is what the weights trained on ImageNet take. The published
network takes images of 224 x 224, whose token maps are multiples of the window; this one pads others to such, as Swin
does where it detects objects.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from utnetv2_fast.models.config import Blocks, NetworkConfig
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.rivals.layers import embedded_channels, repeat_single_channel
from utnetv2_fast.models.rivals.window_attention import (
    Expanding,
    PatchEmbedding,
    SwinBlock,
    SwinStage,
    drop_path_rates,
    initialise,
)
from utnetv2_fast.models.task import Task

_PATCH = 4
_HEADS = (3, 6, 12, 24)


class SwinUNetConfig(NetworkConfig):
    """Every head has `width` channels, so a stage has 3, 6, 12 and 24 times as many."""

    architecture: Literal["swinunet"] = "swinunet"
    dimensions: Literal[2] = 2
    width: PositiveInt = Field(description="channels of an attention head; 32 published")
    depths: tuple[Blocks, Blocks, Blocks, Blocks] = Field(
        default=(2, 2, 6, 2), description="blocks of the encoder's stages; the decoder has those of the first three"
    )
    drop_path: float = Field(default=0.1, ge=0, lt=1, description="of the last block; rises from 0")

    @property
    def stride(self) -> tuple[int, ...]:
        return _PATCH * 8, _PATCH * 8


class SwinUNet(SegmentationNetwork[SwinUNetConfig]):
    """The encoder's parameters have the names of the published Swin-tiny; `layers_up.i` mirrors `layers.(3 - i)`."""

    def __init__(self, config: SwinUNetConfig) -> None:
        super().__init__(config)
        channels = [heads * config.width for heads in _HEADS]
        rates = drop_path_rates(config.depths, config.drop_path)
        self.patch_embed = PatchEmbedding(embedded_channels(config.in_channels), channels[0], (_PATCH, _PATCH))
        self.layers = nn.ModuleList(
            SwinStage(channels[i], _HEADS[i], 2, rates[i], merges=i < 3) for i in range(len(_HEADS))
        )
        self.norm = nn.LayerNorm(channels[3])
        self.layers_up = nn.ModuleList([Expanding(channels[3], channels[2], (2, 2))])
        self.layers_up.extend(_UpStage(channels[i], _HEADS[i], rates[i], expands=i > 0) for i in (2, 1, 0))
        self.norm_up = nn.LayerNorm(channels[0])
        self.up = Expanding(channels[0], channels[0], (_PATCH, _PATCH))
        self.output = nn.Conv2d(channels[0], config.num_classes, 1, bias=False)
        self.apply(initialise)

    def forward_padded(self, x: Tensor) -> Tensor:
        x = self.patch_embed(repeat_single_channel(x))  # (B, H / 4, W / 4, C)
        skips = []
        for stage in self.layers:
            skips.append(x)
            x, _ = stage(x)
        first, *up_stages = self.layers_up
        x = first(self.norm(x))
        for stage, skip in zip(up_stages, reversed(skips[:3]), strict=True):
            x = stage(x, skip)
        return self.output(self.up(self.norm_up(x)).movedim(-1, 1))


class _UpStage(nn.Module):
    """Joins the coarse tokens (B, H, W, C) with the skipped ones, then blocks, then expanding where there is one."""

    def __init__(self, channels: int, heads: int, drop_paths: list[float], *, expands: bool) -> None:
        super().__init__()
        self.join = nn.Linear(2 * channels, channels)
        self.blocks = nn.ModuleList(
            SwinBlock(channels, heads, 2, shifted=i % 2 == 1, drop_path=rate) for i, rate in enumerate(drop_paths)
        )
        self.upsample = Expanding(channels, channels // 2, (2, 2)) if expands else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.join(torch.cat((x, skip), dim=-1))
        for block in self.blocks:
            x, _ = block(x)
        return self.upsample(x)


def configure_swinunet(task: Task, width: int) -> SwinUNetConfig:
    """As published at a width of 32."""
    return SwinUNetConfig(in_channels=task.in_channels, num_classes=task.num_classes, width=width)
