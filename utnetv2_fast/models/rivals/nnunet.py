"""The plain network of nnU-Net (Isensee et al. 2021), as deep as its planner makes it for the patch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from utnetv2_fast.models.config import NetworkConfig
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.task import Task
from utnetv2_fast.nn.channels import concatenate
from utnetv2_fast.nn.convolution import make_conv
from utnetv2_fast.nn.stages import resize_like

# nnU-Net's: how wide its network gets at most, and the shortest axis that it still halves.
_MOST_CHANNELS = {2: 512, 3: 320}
_SHORTEST_HALVED = 8
_SLOPE = 0.01  # of the leaky ReLU
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED_CONV: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class NNUNetConfig(NetworkConfig):
    """Of any number of levels; level 0 is full resolution, level i follows the i-th down-sampling."""

    architecture: Literal["nnunet"] = "nnunet"
    channels: tuple[PositiveInt, ...] = Field(min_length=3, description="of each level")
    scales: tuple[tuple[Literal[1, 2], ...], ...] = Field(description="of the down-samplings, per axis")
    kernel_sizes: tuple[tuple[PositiveInt, ...], ...] = Field(description="of each level, per axis, odd")
    deep_supervision: bool = True

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(math.prod(axis) for axis in zip(*self.scales, strict=True))

    @model_validator(mode="after")
    def _levels_agree(self) -> NNUNetConfig:
        levels = len(self.channels)
        for name, rows, count in (("scales", self.scales, levels - 1), ("kernel_sizes", self.kernel_sizes, levels)):
            if len(rows) != count or any(len(row) != self.dimensions for row in rows):
                raise ValueError(f"{name} must be {count} tuples of {self.dimensions} numbers, got {rows}")
        if any(k % 2 == 0 for row in self.kernel_sizes for k in row):
            raise ValueError(f"kernel_sizes must be odd, got {self.kernel_sizes}")
        return self


class _DoubleConv(nn.Sequential):
    """[conv, instance norm, leaky ReLU] twice, the first with a stride: (B, C_in, *) -> (B, C, *(size / stride))."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...] | int = 1
    ) -> None:
        dimensions, padding = len(kernel_size), tuple(k // 2 for k in kernel_size)
        conv, norm = _CONV[dimensions], _NORM[dimensions]
        super().__init__(
            conv(in_channels, channels, kernel_size, stride, padding, bias=False),
            norm(channels, affine=True),
            nn.LeakyReLU(_SLOPE),
            conv(channels, channels, kernel_size, padding=padding, bias=False),
            norm(channels, affine=True),
            nn.LeakyReLU(_SLOPE),
        )


def _initialise(module: nn.Module) -> None:
    """nnU-Net's rule for convolutions of every kind, the last too."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class NNUNet(SegmentationNetwork[NNUNetConfig]):
    """Strided convolutions down, transposed ones up, with the kernels of the level they lead to.

    MONAI's DynUNet is the same where all levels have one kernel; else, up, it has those of the level below.

    The auxiliary logits are nnU-Net's second output, at half the resolution; its lower ones are left out.
    """

    def __init__(self, config: NNUNetConfig) -> None:
        super().__init__(config)
        c, k, scales = config.channels, config.kernel_sizes, config.scales
        levels = range(1, len(c))
        self.stem = _DoubleConv(config.in_channels, c[0], k[0])
        self.down = nn.ModuleList(_DoubleConv(c[i - 1], c[i], k[i], scales[i - 1]) for i in levels)
        transposed = _TRANSPOSED_CONV[config.dimensions]
        # A transposed convolution as large as its stride puts each position in place of a patch.
        self.enlarge = nn.ModuleList(
            transposed(c[i], c[i - 1], scales[i - 1], scales[i - 1], bias=False) for i in reversed(levels)
        )
        self.up = nn.ModuleList(_DoubleConv(2 * c[i - 1], c[i - 1], k[i - 1]) for i in reversed(levels))
        ones = (1,) * config.dimensions
        self.head = make_conv(c[0], config.num_classes, ones, bias=True)
        self.auxiliary_head = make_conv(c[1], config.num_classes, ones, bias=True) if config.deep_supervision else None
        self.apply(_initialise)

    def forward_padded(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        image, x = x, self.stem(x)
        skips = [x]
        for encode in self.down:
            x = encode(x)
            skips.append(x)
        decoded = [skips.pop()]
        for enlarge, decode in zip(self.enlarge, self.up, strict=True):
            decoded.append(decode(concatenate(enlarge(decoded[-1]), skips.pop())))
        logits = self.head(decoded[-1])
        if self.auxiliary_head is not None and self.training:
            return logits, resize_like(self.auxiliary_head(decoded[-2]), image)
        return logits


def configure_nnunet(task: Task, width: int) -> NNUNetConfig:
    """How it fits a task, of the width it is given, which doubles from level to level up to nnU-Net's limit.

    The task's down-samplings come first. Then, as nnU-Net's planner does, each axis is halved while it stays long.
    """
    scales: Any = (*task.scales, *_further_scales(task))
    kernel_sizes = [*task.kernel_sizes, *[task.kernel_sizes[-1]] * (len(scales) - len(task.scales))]
    most = _MOST_CHANNELS[task.dimensions] * width // 32
    return NNUNetConfig(
        dimensions=task.dimensions,
        in_channels=task.in_channels,
        num_classes=task.num_classes,
        channels=tuple(max(1, min(width * 2**level, most)) for level in range(len(scales) + 1)),
        scales=scales,
        kernel_sizes=tuple(kernel_sizes),
        deep_supervision=task.fields.get("deep_supervision", True),
    )


def _further_scales(task: Task) -> list[tuple[int, ...]]:
    size = [n // math.prod(axis) for n, axis in zip(task.patch_size, zip(*task.scales, strict=True), strict=True)]
    scales: list[tuple[int, ...]] = []
    while any(n >= _SHORTEST_HALVED for n in size):
        scales.append(tuple(2 if n >= _SHORTEST_HALVED else 1 for n in size))
        size = [n // s for n, s in zip(size, scales[-1], strict=True)]
    return scales
