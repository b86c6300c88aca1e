"""The convolutional parts of UTNetV2 in 2D and 3D: residual blocks, depthwise-separable projections, MBConv."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from utnetv2_fast import ops

Norm = Literal["batch", "instance"]
Impl = Literal["auto", "reference", "cpu", "triton"]

_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def make_norm(norm: Norm, channels: int, dimensions: int, *, instance_eps: float = 1e-5) -> nn.Module:
    """Batch norm with affine parameters, or instance norm without any, over `dimensions` axes after the channel.

    The authors' instance norms have two different eps: 1e-4 in front of a convolution, 1e-5 elsewhere.
    """
    if norm == "batch":
        return _BATCH_NORM[dimensions](channels)
    return _INSTANCE_NORM[dimensions](channels, eps=instance_eps)


def make_conv(in_channels: int, out_channels: int, kernel_size: tuple[int, ...], *, bias: bool = False) -> nn.Module:
    """Dense convolution, stride 1, 'same' padding, of as many dimensions as the kernel has."""
    conv: Callable[..., nn.Module] = _CONV[len(kernel_size)]
    return conv(in_channels, out_channels, kernel_size, padding=tuple(k // 2 for k in kernel_size), bias=bias)


class DepthwiseConv(nn.Module):
    """Depthwise convolution without bias: x (B, C, *spatial) -> the same shape."""

    def __init__(self, channels: int, kernel_size: tuple[int, ...], *, impl: Impl = "auto") -> None:
        super().__init__()
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(channels, 1, *kernel_size))  # (C, 1, *k)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise_conv(x, self.weight, impl=self.impl)


class DepthwiseSeparableConv(nn.Module):
    """Depthwise then pointwise convolution, nothing between: x (B, C_in, *spatial) -> (B, C_out, *spatial)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], *, impl: Impl = "auto"
    ) -> None:
        super().__init__()
        self.impl = impl
        ones = (1,) * len(kernel_size)
        self.depthwise_weight = nn.Parameter(torch.empty(in_channels, 1, *kernel_size))  # (C_in, 1, *k)
        self.pointwise_weight = nn.Parameter(torch.empty(out_channels, in_channels, *ones))  # (C_out, C_in, 1, ..)
        for weight in (self.depthwise_weight, self.pointwise_weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise_separable_conv(x, self.depthwise_weight, self.pointwise_weight, impl=self.impl)


class NormActConv(nn.Sequential):
    """The pre-activation order: normalise, ReLU (left out where `act` is False), convolve."""

    def __init__(self, norm: Norm, in_channels: int, conv: nn.Module, *, dimensions: int, act: bool = True) -> None:
        super().__init__()
        self.norm = make_norm(norm, in_channels, dimensions, instance_eps=1e-4)
        self.act = nn.ReLU() if act else nn.Identity()
        self.conv = conv


class ResidualBlock(nn.Module):
    """[norm, ReLU, conv] twice plus a shortcut; nothing after the sum. (B, C_in, *spatial) -> (B, C_out, *spatial).

    Where the channels change the shortcut is [norm, ReLU, conv] with the block's own kernel, as in the authors' code.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], norm: Norm) -> None:
        super().__init__()

        def norm_act_conv(channels: int) -> NormActConv:
            conv = make_conv(channels, out_channels, kernel_size)
            return NormActConv(norm, channels, conv, dimensions=len(kernel_size))

        self.conv1 = norm_act_conv(in_channels)
        self.conv2 = norm_act_conv(out_channels)
        self.shortcut = norm_act_conv(in_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.shortcut(x)


class SqueezeExcitation(nn.Module):
    """Gates each channel by a two-layer function of all channels' spatial means (Hu et al. 2018), ratio 4."""

    def __init__(self, channels: int, dimensions: int, ratio: int = 4) -> None:
        super().__init__()
        ones = (1,) * dimensions
        self.reduce = make_conv(channels, channels // ratio, ones, bias=True)
        self.expand = make_conv(channels // ratio, channels, ones, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)  # (B, C, 1, ..)
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(mean))))


class MBConv(nn.Module):
    """Feed-forward network of a B-MHA block (paper Eq. 3): expand, depthwise, squeeze-excite, project, add."""

    def __init__(
        self, channels: int, kernel_size: tuple[int, ...], expansion: int, norm: Norm, *, impl: Impl = "auto"
    ) -> None:
        super().__init__()
        hidden, dimensions, ones = channels * expansion, len(kernel_size), (1,) * len(kernel_size)
        self.expand = NormActConv(norm, channels, make_conv(channels, hidden, ones), dimensions=dimensions)
        depthwise = DepthwiseConv(hidden, kernel_size, impl=impl)
        self.depthwise = NormActConv(norm, hidden, depthwise, dimensions=dimensions)
        self.excite = SqueezeExcitation(hidden, dimensions)
        self.project = NormActConv(norm, hidden, make_conv(hidden, channels, ones), dimensions=dimensions, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.excite(self.depthwise(self.expand(x))))
