"""UTNetV2: a convolutional stem and decoder around an encoder and decoder of B-MHA blocks (paper Fig. 1A)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from utnetv2_fast.models.config import UTNetV2Config
from utnetv2_fast.models.medformer_weights import convert_medformer_state_dict
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.presets import get_preset
from utnetv2_fast.nn.convolution import make_conv
from utnetv2_fast.nn.semantic_map import SemanticMapFusion
from utnetv2_fast.nn.stages import (
    AttentionDownStage,
    AttentionUpStage,
    ConvDownStage,
    ConvUpStage,
    Stem,
    resize_like,
)


class UTNetV2(SegmentationNetwork[UTNetV2Config]):
    """Segments images (B, C, H, W) or volumes (B, C, D, H, W) of any size into logits (B, classes, *spatial).

    In training mode with `config.deep_supervision` the result is `(logits, auxiliary_logits)`, the latter from the last
    decoder B-MHA block, resized to the input.
    """

    def __init__(self, config: UTNetV2Config) -> None:
        super().__init__(config)
        c, k, s, norm, impl = config.channels, config.kernel_sizes, config.scales, config.norm, config.impl
        self.stem = Stem(config.in_channels, c[0], k[0], norm, impl=impl)
        self.conv_down = ConvDownStage(c[0], c[1], s[0], k[1], norm, impl=impl)
        self.down = nn.ModuleList(
            AttentionDownStage(
                c[level - 1],
                c[level],
                s[level - 1],
                k[level],
                norm,
                blocks=config.blocks[level - 2],
                heads=config.heads[level - 2],
                map_tokens=config.map_tokens,
                expansion=config.expansion,
                impl=impl,
            )
            for level in (2, 3, 4)
        )
        self.map_fusion = SemanticMapFusion(c[2:], config.fusion_channels, config.fusion_heads, config.fusion_blocks)
        self.up = nn.ModuleList(
            AttentionUpStage(
                c[level + 1],
                c[level],
                k[level],
                norm,
                blocks=config.blocks[level - 2],
                heads=config.heads[level - 2],
                expansion=config.expansion,
                reduce_skip=config.reduce_skip,
                last_updates_map=level > 2,  # the last one's map would go nowhere
                impl=impl,
            )
            for level in (3, 2)
        )
        self.conv_up = nn.ModuleList(
            ConvUpStage(c[level + 1], c[level], k[level], norm, reduce_skip=config.reduce_skip, impl=impl)
            for level in (1, 0)
        )
        ones = (1,) * config.dimensions
        self.head = make_conv(c[0], config.num_classes, ones, bias=True)
        self.auxiliary_head = make_conv(c[2], config.num_classes, ones, bias=True) if config.deep_supervision else None

    @classmethod
    def from_preset(cls, name: str, *, in_channels: int, num_classes: int, **changes: Any) -> UTNetV2:
        """Build the preset `name` with any field of `UTNetV2Config` changed by keyword."""
        fields = get_preset(name).fields | {"in_channels": in_channels, "num_classes": num_classes} | changes
        return cls(UTNetV2Config(**fields))

    def load_medformer_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the weights of the authors' MedFormer; ValueError naming what does not fit.

        Their parameters that never receive a gradient (the map output of the last B-MHA block and two map reductions
        of the 2D network) have no place here and are left out.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        try:
            converted = convert_medformer_state_dict(state_dict, self.config)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"state_dict is not that of a MedFormer of this configuration: {error}") from None
        given = {name: tuple(tensor.shape) for name, tensor in converted.items()}
        for name in (*given, *wanted):
            if wanted.get(name) != given.get(name):
                raise ValueError(
                    f"state_dict does not fit: {name} has shape {given.get(name)}, this network's {wanted.get(name)}"
                )
        self.load_state_dict(converted)

    def forward_padded(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits, auxiliary = self._logits_and_token_map(x)
        if self.auxiliary_head is not None and self.training:
            return logits, resize_like(self.auxiliary_head(auxiliary), x)
        return logits

    def _logits_and_token_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the token map of level 2 that the auxiliary head reads."""
        skip0 = self.stem(x)
        skip1 = self.conv_down(skip0)
        x, skips, maps = skip1, [], []
        for stage in self.down:
            x, semantic_map = stage(x)
            skips.append(x)
            maps.append(semantic_map)
        map2, map3, semantic_map = self.map_fusion(maps)
        x, semantic_map = self.up[0](x, skips[1], semantic_map, map3)
        auxiliary, _ = self.up[1](x, skips[0], semantic_map, map2)
        x = self.conv_up[0](auxiliary, skip1)
        x = self.conv_up[1](x, skip0)
        return self.head(x), auxiliary
