"""The ResNet-50 of TransUNet and R50-UNet, with weight-standardised convolutions and group norms (hybrid ViT's)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

UNITS = (3, 4, 9)  # of the stages at 1/4, 1/8 and 1/16; the last stage of a ResNet-50 went into the third
WIDENING = 4  # from the middle of a unit to its end
_GROUPS = 32


def group_norm(channels: int, *, eps: float = 1e-6) -> nn.GroupNorm:
    """In 32 groups, as published, or in as many as divide fewer channels."""
    return nn.GroupNorm(math.gcd(_GROUPS, channels), channels, eps=eps)


class StandardisedConv2d(nn.Conv2d):
    """A convolution without bias whose weights have mean 0 and variance 1 for every output channel."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        axes = (1, 2, 3)
        centred = self.weight - self.weight.mean(axes, keepdim=True)
        weight = centred * (centred.square().mean(axes, keepdim=True) + 1e-5).rsqrt()
        return F.conv2d(x, weight, None, self.stride, self.padding)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution with a residual: (B, C_in, H, W) -> (B, 4 middle, H / stride, W / stride)."""

    def __init__(self, in_channels: int, middle: int, stride: int) -> None:
        super().__init__()
        out_channels = WIDENING * middle
        self.conv1 = StandardisedConv2d(in_channels, middle, 1)
        self.gn1 = group_norm(middle)
        self.conv2 = StandardisedConv2d(middle, middle, 3, stride=stride)
        self.gn2 = group_norm(middle)
        self.conv3 = StandardisedConv2d(middle, out_channels, 1)
        self.gn3 = group_norm(out_channels)
        self.conv_proj: nn.Module = nn.Identity()
        self.gn_proj: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.conv_proj = StandardisedConv2d(in_channels, out_channels, 1, stride=stride)
            self.gn_proj = nn.GroupNorm(out_channels, out_channels)  # a group each: an affine instance norm

    def forward(self, x: Tensor) -> Tensor:
        out = self.gn1(self.conv1(x)).relu()
        out = self.gn2(self.conv2(out)).relu()
        return (self.gn3(self.conv3(out)) + self.gn_proj(self.conv_proj(x))).relu()


class ResNet50(nn.Module):
    """Features of (B, C, H, W) at 1/2, 1/4, 1/8, 1/16, of width, 4, 8 and 16 width channels; width 64 published."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv_root = StandardisedConv2d(in_channels, width, 7, stride=2)
        self.gn_root = group_norm(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage, units in enumerate(UNITS):
            middle = width * 2**stage
            first = Bottleneck(channels, middle, stride=1 if stage == 0 else 2)
            channels = WIDENING * middle
            blocks.append(nn.Sequential(first, *(Bottleneck(channels, middle, stride=1) for _ in range(units - 1))))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.gn_root(self.conv_root(x)).relu()]
        # The window of the last position reaches over the edge, as in the network that the published weights are of:
        # so an even size is halved, and no row of zeros need be appended to a feature.
        x = F.max_pool2d(features[0], 3, stride=2, ceil_mode=True)
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features
