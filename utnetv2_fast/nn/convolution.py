"""The convolutional parts of UTNetV2 in 2D and 3D: residual blocks, depthwise-separable projections, MBConv."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast import ops
from utnetv2_fast.nn.normalised_conv import Moments, fuses, normalised_conv, scale_and_shift, through_moments
from utnetv2_fast.ops.arguments import autocast_dtype
from utnetv2_fast.ops.dense_conv import in_layout_of, planes
from utnetv2_fast.ops.dispatch import Impl

Norm = Literal["batch", "instance"]

_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _FlatConv3d(nn.Conv3d):
    """A convolution in 3D with one tap in D; in bfloat16 that of the planes, see `ops.dense_conv`."""

    def forward(self, x: Tensor) -> Tensor:
        if (autocast_dtype(x) or x.dtype) != torch.bfloat16:
            return super().forward(x)
        out = F.conv2d(planes(x), self.weight.squeeze(2), self.bias, padding=self.padding[1:])
        return out.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)


def make_norm(norm: Norm, channels: int, dimensions: int, *, instance_eps: float = 1e-5) -> nn.Module:
    """Batch norm with affine parameters, or instance norm without any, over `dimensions` axes after the channel.

    The authors' instance norms have two different eps: 1e-4 in front of a convolution, 1e-5 elsewhere.
    """
    if norm == "batch":
        return _BATCH_NORM[dimensions](channels)
    return _INSTANCE_NORM[dimensions](channels, eps=instance_eps)


def make_conv(in_channels: int, out_channels: int, kernel_size: tuple[int, ...], *, bias: bool = False) -> nn.Module:
    """Dense convolution, stride 1, 'same' padding, of as many dimensions as the kernel has."""
    flat = len(kernel_size) == 3 and kernel_size[0] == 1
    conv: Callable[..., nn.Module] = _FlatConv3d if flat else _CONV[len(kernel_size)]
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


def weights_of(conv: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The depthwise and the dense weight of a convolution without bias; None for the one that it lacks."""
    if isinstance(conv, DepthwiseConv):
        return conv.weight, None
    if isinstance(conv, DepthwiseSeparableConv):
        return conv.depthwise_weight, conv.pointwise_weight
    assert isinstance(conv.weight, Tensor)
    return None, conv.weight


def convolve(conv: nn.Module, x: Tensor, impl: Impl) -> Tensor:
    """`conv`, dense and without bias, of x: on a CPU by the fastest kernel, unless `impl` is "reference"."""
    if impl == "reference" or x.device.type != "cpu":
        out = conv(x)
        assert isinstance(out, Tensor)
        return out
    assert isinstance(conv.weight, Tensor)
    assert conv.bias is None
    return ops.dense_conv(x, conv.weight)


def conv_of_norm(
    norm: nn.Module, conv: nn.Module, x: Tensor, moments: Moments | None, *, relu: bool = False, impl: Impl
) -> Tensor:
    """`conv` of [ReLU of] `norm` of x, which has these moments; only where the norm fuses."""
    return normalised_conv(x, *scale_and_shift(norm, moments, x), *weights_of(conv), relu=relu, impl=impl)


class NormActConv(nn.Sequential):
    """The pre-activation order: normalise, ReLU (left out where `act` is False), convolve."""

    def __init__(
        self,
        norm: Norm,
        in_channels: int,
        conv: nn.Module,
        *,
        dimensions: int,
        act: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.impl: Impl = impl
        self.norm = make_norm(norm, in_channels, dimensions, instance_eps=1e-4)
        self.act = nn.ReLU() if act else nn.Identity()
        self.conv = conv

    def fuses(self, x: Tensor) -> bool:
        return fuses(self.norm, x, self.impl)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fuses(x):
            return self.conv(self.act(self.norm(x)))
        return self.of_moments(*through_moments(self.norm, x, self.impl))

    def of_moments(self, x: Tensor, moments: Moments | None) -> Tensor:
        """The same of an x whose moments others need too; only where this fuses."""
        relu = isinstance(self.act, nn.ReLU)
        return conv_of_norm(self.norm, self.conv, x, moments, relu=relu, impl=self.impl)


class ConvNormAct(nn.Module):
    """The order of the first UNets: convolve, normalise, ReLU. (B, C_in, *spatial) -> (B, C_out, *spatial)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], norm: Norm) -> None:
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, kernel_size)
        self.norm = make_norm(norm, out_channels, len(kernel_size), instance_eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        # torch takes a single sample of a single channel for channels-first, whatever its strides.
        return torch.relu(self.norm(in_layout_of(x, self.conv(x))))


class ResidualBlock(nn.Module):
    """[norm, ReLU, conv] twice plus a shortcut; nothing after the sum. (B, C_in, *spatial) -> (B, C_out, *spatial).

    Where the channels change the shortcut is [norm, ReLU, conv] with the block's own kernel, as in the authors' code.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], norm: Norm, *, impl: Impl = "auto"
    ) -> None:
        super().__init__()

        def norm_act_conv(channels: int) -> NormActConv:
            conv = make_conv(channels, out_channels, kernel_size)
            return NormActConv(norm, channels, conv, dimensions=len(kernel_size), impl=impl)

        self.conv1 = norm_act_conv(in_channels)
        self.conv2 = norm_act_conv(out_channels)
        self.shortcut = norm_act_conv(in_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not self.conv1.fuses(x):
            return self.conv2(self.conv1(x)) + self.shortcut(x)
        x, moments = through_moments(self.conv1.norm, x, self.conv1.impl)
        out = self.conv2(self.conv1.of_moments(x, moments))
        return out + (self.shortcut.of_moments(x, moments) if isinstance(self.shortcut, NormActConv) else x)


class SqueezeExcitation(nn.Module):
    """Gates each channel by a two-layer function of all channels' spatial means (Hu et al. 2018), ratio 4."""

    def __init__(self, channels: int, dimensions: int, ratio: int = 4) -> None:
        super().__init__()
        ones = (1,) * dimensions
        self.reduce = make_conv(channels, channels // ratio, ones, bias=True)
        self.expand = make_conv(channels // ratio, channels, ones, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean(dim=tuple(range(2, x.ndim)), keepdim=True))

    def gate(self, mean: Tensor) -> Tensor:
        """Factors (B, C, 1, ..) from means (B, C, 1, ..)."""
        return torch.sigmoid(self.expand(torch.relu(self.reduce(mean))))


class MBConv(nn.Module):
    """Feed-forward network of a B-MHA block (paper Eq. 3): expand, depthwise, squeeze-excite, project, add."""

    def __init__(
        self, channels: int, kernel_size: tuple[int, ...], expansion: int, norm: Norm, *, impl: Impl = "auto"
    ) -> None:
        super().__init__()
        self.impl: Impl = impl
        hidden, dimensions, ones = channels * expansion, len(kernel_size), (1,) * len(kernel_size)

        def norm_conv(in_channels: int, conv: nn.Module, *, act: bool = True) -> NormActConv:
            return NormActConv(norm, in_channels, conv, dimensions=dimensions, act=act, impl=impl)

        self.expand = norm_conv(channels, make_conv(channels, hidden, ones))
        self.depthwise = norm_conv(hidden, DepthwiseConv(hidden, kernel_size, impl=impl))
        self.excite = SqueezeExcitation(hidden, dimensions)
        self.project = norm_conv(hidden, make_conv(hidden, channels, ones), act=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.expand.fuses(x):
            return x + self.project(self.excite(self.depthwise(self.expand(x))))
        x, moments = through_moments(self.expand.norm, x, self.impl)
        return x + self._project_excited(self.depthwise(self.expand.of_moments(x, moments)))

    def _project_excited(self, x: Tensor) -> Tensor:
        """Squeeze-excite and project in one: gate * x has moments that follow from those of x and the gate."""
        x, mean, variance = ops.through_channel_moments(x, impl=self.impl)
        gate = (
            self.excite.gate(mean.view(*mean.shape, *[1] * (x.ndim - 2)).to(x.dtype)).flatten(1).to(mean.dtype)
        )  # (B, C)
        gated_moments = (gate * mean, gate.square() * variance)
        scale, shift = scale_and_shift(self.project.norm, gated_moments, x)
        return normalised_conv(x, gate * scale, shift, *weights_of(self.project.conv), relu=False, impl=self.impl)


class Perceptron(nn.Module):
    """Feed-forward network of a conventional Transformer, pre-norm: expand and project pointwise, add."""

    def __init__(self, channels: int, dimensions: int, expansion: int, norm: Norm) -> None:
        super().__init__()
        hidden, ones = channels * expansion, (1,) * dimensions
        self.norm = make_norm(norm, channels, dimensions)
        self.expand = make_conv(channels, hidden, ones, bias=True)
        self.project = make_conv(hidden, channels, ones, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.gelu(self.expand(self.norm(x))))
