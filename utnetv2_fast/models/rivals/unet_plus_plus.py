"""UNet++ (Zhou et al. 2018): a U whose skip connections are Us of their own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from utnetv2_fast.models.config import LEVELS, FiveLevelConfig
from utnetv2_fast.models.hybrid import five_levels, scaled_channels
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.task import Task
from utnetv2_fast.nn.convolution import ConvNormAct, Norm, make_conv
from utnetv2_fast.nn.stages import resize_like


class UNetPlusPlusConfig(FiveLevelConfig):
    """Channels and kernels of the five levels are all there is to choose."""

    architecture: Literal["unet++"] = "unet++"


class UNetPlusPlus(SegmentationNetwork[UNetPlusPlusConfig]):
    """Node (i, j) is a double convolution at level i of the nodes (i, 0) to (i, j - 1) and of (i + 1, j - 1), resized.

    The nodes (i, 0) are the encoder; (0, 4) gives the logits. The auxiliary logits, which its authors read from the
    nodes (0, 1) to (0, 3), come from the decoder's node of level 2, as those of all networks here do.
    """

    def __init__(self, config: UNetPlusPlusConfig) -> None:
        super().__init__(config)
        c, k = config.channels, config.kernel_sizes
        pooling = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[config.dimensions]
        self.encoder = nn.ModuleList(
            nn.Sequential(
                pooling(config.scales[i - 1]) if i > 0 else nn.Identity(),
                _double_conv(c[i - 1] if i > 0 else config.in_channels, c[i], k[i], config.norm),
            )
            for i in range(LEVELS)
        )
        # Column j has no node at the j lowest levels: each is made of one below it and one column to the left.
        self.columns = nn.ModuleList(
            nn.ModuleList(_double_conv(j * c[i] + c[i + 1], c[i], k[i], config.norm) for i in range(LEVELS - j))
            for j in range(1, LEVELS)
        )
        ones = (1,) * config.dimensions
        self.head = make_conv(c[0], config.num_classes, ones, bias=True)
        self.auxiliary_head = make_conv(c[2], config.num_classes, ones, bias=True) if config.deep_supervision else None

    def forward_padded(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        image = x
        levels: list[list[Tensor]] = []  # the nodes of each level, column by column
        for encode in self.encoder:
            x = encode(x)
            levels.append([x])
        for column in self.columns:
            assert isinstance(column, nn.ModuleList)
            coarse = [nodes[-1] for nodes in levels]
            for i, node in enumerate(column):
                skipped = levels[i]
                skipped.append(node(torch.cat([*skipped, resize_like(coarse[i + 1], skipped[0])], dim=1)))
        logits = self.head(levels[0][-1])
        if self.auxiliary_head is not None and self.training:
            return logits, resize_like(self.auxiliary_head(levels[2][-1]), image)
        return logits


def _double_conv(in_channels: int, channels: int, kernel_size: tuple[int, ...], norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        ConvNormAct(in_channels, channels, kernel_size, norm), ConvNormAct(channels, channels, kernel_size, norm)
    )


def configure_unet_plus_plus(task: Task, width: int) -> UNetPlusPlusConfig:
    """How it fits a task, of the width it is given."""
    return UNetPlusPlusConfig(**five_levels(task, scaled_channels(task, width)))
