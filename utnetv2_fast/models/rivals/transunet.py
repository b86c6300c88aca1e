"""TransUNet (Chen et al., 2021): ResNet-50, vision Transformer and decoder; and R50-UNet, which has no Transformer.

An image of a single channel is repeated to three, which is what the weights trained on ImageNet take. Any size goes in:
the embedding of positions is learnt on the grid of the patch size and interpolated to others.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast.models.config import Blocks, NetworkConfig
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.rivals.layers import Perceptron, embedded_channels, repeat_single_channel
from utnetv2_fast.models.rivals.resnet50 import WIDENING, ResNet50
from utnetv2_fast.models.task import Task

STRIDE = 16
_HEADS = 12  # each of as many channels as the ResNet's first convolution gives: 768 = 12 * 64 published


class R50UNetConfig(NetworkConfig):
    """All channels follow from `width`, those of the first convolution."""

    architecture: Literal["r50-unet"] = "r50-unet"
    dimensions: Literal[2] = 2
    width: PositiveInt = Field(description="channels at half resolution; 64 published")

    @property
    def stride(self) -> tuple[int, ...]:
        return STRIDE, STRIDE


class TransUNetConfig(NetworkConfig):
    """All channels follow from `width`, those of the ResNet's first convolution and of an attention head."""

    architecture: Literal["transunet"] = "transunet"
    dimensions: Literal[2] = 2
    width: PositiveInt = Field(description="channels at half resolution, and of each of the 12 heads; 64 published")
    blocks: Blocks = 12
    dropout: float = Field(default=0.1, ge=0, lt=1, description="of tokens and in the perceptrons")
    grid: tuple[PositiveInt, PositiveInt] = Field(description="positions whose embedding is learnt")

    @property
    def stride(self) -> tuple[int, ...]:
        return STRIDE, STRIDE

    @property
    def token_channels(self) -> int:
        return _HEADS * self.width


class R50UNet(SegmentationNetwork[R50UNetConfig]):
    """ResNet-50 and decoder; the decoder's first convolution reads the 16 width channels of the ResNet itself."""

    def __init__(self, config: R50UNetConfig) -> None:
        super().__init__(config)
        self.resnet = ResNet50(embedded_channels(config.in_channels), config.width)
        self.decoder = _Decoder(4 * WIDENING * config.width, config.width, config.num_classes)

    def forward_padded(self, x: Tensor) -> Tensor:
        *skips, deepest = self.resnet(repeat_single_channel(x))
        return self.decoder(deepest, skips)


class TransUNet(SegmentationNetwork[TransUNetConfig]):
    """ResNet-50, Transformer on the positions at 1/16, decoder."""

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__(config)
        channels = config.token_channels
        self.resnet = ResNet50(embedded_channels(config.in_channels), config.width)
        self.embedding = nn.Conv2d(4 * WIDENING * config.width, channels, 1)
        self.position_embedding = nn.Parameter(torch.zeros(1, math.prod(config.grid), channels))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(channels, _HEADS, config.dropout) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.decoder = _Decoder(channels, config.width, config.num_classes)

    def forward_padded(self, x: Tensor) -> Tensor:
        *skips, deepest = self.resnet(repeat_single_channel(x))
        grid = (deepest.shape[2], deepest.shape[3])
        tokens = self.embedding(deepest).flatten(2).transpose(1, 2)  # (B, n, C)
        tokens = self.dropout(tokens + resize_positions(self.position_embedding, self.config.grid, grid))
        for block in self.blocks:
            tokens = block(tokens)
        return self.decoder(self.norm(tokens).transpose(1, 2).unflatten(2, grid), skips)


def resize_positions(embedding: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """The embedding of the positions of one grid, (1, n, C), interpolated to another grid, corners kept."""
    if grid == wanted:
        return embedding
    as_map = embedding.transpose(1, 2).unflatten(2, grid)  # (1, C, H, W)
    return F.interpolate(as_map, wanted, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)


class _Block(nn.Module):
    """A pre-norm Transformer block on tokens (B, n, C)."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(channels, eps=1e-6)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.perceptron_norm = nn.LayerNorm(channels, eps=1e-6)
        self.perceptron = Perceptron(channels, 4 * channels, dropout=dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attention_norm(tokens)
        q, k, v = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, n, d)
            for projection in (self.query, self.key, self.value)
        )
        tokens = tokens + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return tokens + self.perceptron(self.perceptron_norm(tokens))


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class _Decoder(nn.Module):
    """From features at 1/16 to logits: four times doubled, joined with the skip of that size where there is one.

    `forward` takes the features (B, C_in, H / 16, W / 16) and the skips at 1/2, 1/4 and 1/8.
    """

    def __init__(self, in_channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        deepest, last = 8 * width, -(-width // 4)
        self.first = _conv_norm_relu(in_channels, deepest)
        skips = (2 * WIDENING * width, WIDENING * width, width, 0)
        channels = (deepest, 4 * width, 2 * width, width, last)
        self.stages = nn.ModuleList(
            nn.Sequential(
                _conv_norm_relu(channels[i] + skips[i], channels[i + 1]), _conv_norm_relu(*[channels[i + 1]] * 2)
            )
            for i in range(4)
        )
        self.head = nn.Conv2d(last, num_classes, 3, padding=1)

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.first(x)
        for stage, skip in zip(self.stages, (*reversed(skips), None), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
            x = stage(x if skip is None else torch.cat((x, skip), dim=1))
        return self.head(x)


def configure_r50_unet(task: Task, width: int) -> R50UNetConfig:
    """As published at a width of 64."""
    return R50UNetConfig(**_channels(task), width=width)


def configure_transunet(task: Task, width: int) -> TransUNetConfig:
    """As published at a width of 64; positions as many as the patch has."""
    rows, columns = (-(-n // STRIDE) for n in task.patch_size)
    return TransUNetConfig(**_channels(task), width=width, grid=(rows, columns))


def _channels(task: Task) -> dict[str, Any]:
    return {"in_channels": task.in_channels, "num_classes": task.num_classes}
