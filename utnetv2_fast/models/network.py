"""What every segmentation network does with its input and output, whatever lies between."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast.models.config import NetworkConfig

Config = TypeVar("Config", bound=NetworkConfig, covariant=True)


class SegmentationNetwork(nn.Module, Generic[Config]):
    """Segments images (B, C, H, W) or volumes (B, C, D, H, W) of any size into logits (B, classes, *spatial).

    In training mode a network may return `(logits, auxiliary_logits)`, both of the input's size, to be trained on both.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if x.ndim != self.config.dimensions + 2 or x.shape[1] != self.config.in_channels:
            axes = ("H", "W") if self.config.dimensions == 2 else ("D", "H", "W")
            raise ValueError(
                f"x must be (B, {self.config.in_channels}, {', '.join(axes)}), got {tuple(x.shape)}: "
                "the network was built for these channels and dimensions"
            )
        size = x.shape[2:]
        padded = self.config.padded_size(tuple(size))
        x = F.pad(x, [amount for n, p in reversed(list(zip(size, padded, strict=True))) for amount in (0, p - n)])
        if self._runs_channels_last(x.device):
            # Convolutions hand the layout on. (A clone: `contiguous` leaves the strides of a single channel.)
            memory_format = torch.channels_last if self.config.dimensions == 2 else torch.channels_last_3d
            x = x.clone(memory_format=memory_format)
        crop = (slice(None), slice(None), *(slice(n) for n in size))
        outputs = self.forward_padded(x)
        return outputs[crop] if isinstance(outputs, Tensor) else (outputs[0][crop], outputs[1][crop])

    @abstractmethod
    def forward_padded(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The same for an input whose axes are as `config.padded_size` says."""

    def _runs_channels_last(self, device: torch.device) -> bool:
        """Always in 2D; in 3D on a CPU, and on a GPU unless it is to run plain PyTorch.

        On a CPU it is the layout of the fastest kernels, torch's and ours: tiny-3d takes 1.2 s a step in it, 1.7 s
        without. On a GPU that is not measured yet. Our kernels read either layout at full width there, a convolution of
        one tap is a product of matrices in this one, and cuDNN's convolutions on tensor cores work in it: others saw
        them convert channels-first volumes there and back (github.com/ModelTC/LightX2V/pull/860).
        """
        if self.config.dimensions == 2 or device.type == "cpu":
            return True
        return device.type == "cuda" and self.config.impl != "reference"
