"""UNETR (Hatamizadeh et al., 2022): a vision Transformer on patches of 16 x 16 x 16 with a convolutional decoder.

The network is MONAI's, which belongs to the extra `rivals` and is imported only when one is built.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from utnetv2_fast.errors import InputError
from utnetv2_fast.models.config import NetworkConfig
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.task import Task

_PATCH = 16
_HEADS = 12  # and blocks: MONAI's are always 12


class UNETRConfig(NetworkConfig):
    """All channels follow from `width`. The input size is fixed, as every position has an embedding of its own."""

    architecture: Literal["unetr"] = "unetr"
    dimensions: Literal[3] = 3
    width: PositiveInt = Field(description="channels of each of the 12 heads; 64 published")
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        description="largest input, which smaller ones are padded to; becomes multiples of 16"
    )

    @property
    def stride(self) -> tuple[int, ...]:
        return (_PATCH,) * 3

    @property
    def fixed_size(self) -> tuple[int, ...]:
        return tuple(-(-n // _PATCH) * _PATCH for n in self.input_size)

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The one size there is; ValueError for an input that is larger along an axis."""
        if any(n > most for n, most in zip(size, self.fixed_size, strict=True)):
            raise ValueError(f"UNETR was built for at most {self.fixed_size} voxels, got {size}: use sliding windows")
        return self.fixed_size

    @property
    def token_channels(self) -> int:
        return _HEADS * self.width

    @property
    def feature_size(self) -> int:
        """Channels of the decoder at full resolution: 16 published."""
        return max(1, round(self.width / 4))


class UNETR(SegmentationNetwork[UNETRConfig]):
    """Raises InputError when MONAI is missing."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__(config)
        self.network = _monai_unetr()(
            in_channels=config.in_channels,
            out_channels=config.num_classes,
            img_size=config.fixed_size,
            feature_size=config.feature_size,
            hidden_size=config.token_channels,
            mlp_dim=4 * config.token_channels,
            num_heads=_HEADS,
        )
        for block in self.network.vit.blocks:
            # MONAI's blocks have the norm of a cross-attention, those of some versions the attention too, and run
            # neither.
            for name in ("norm_cross_attn", "cross_attn"):
                if hasattr(block, name):
                    setattr(block, name, nn.Identity())

    def forward_padded(self, x: Tensor) -> Tensor:
        return self.network(x)


def _monai_unetr() -> Any:
    try:
        import einops  # noqa: F401 (which MONAI misses only once a network is built)
        from monai.networks.nets import unetr
    except ImportError:
        raise InputError('The network unetr is MONAI\'s: pip install "utnetv2-fast[rivals]".') from None
    return unetr.UNETR


def configure_unetr(task: Task, width: int) -> UNETRConfig:
    """As published at a width of 64, for inputs of the patch size."""
    depth, height, length = task.patch_size
    return UNETRConfig(
        in_channels=task.in_channels, num_classes=task.num_classes, width=width, input_size=(depth, height, length)
    )
