"""A U whose blocks are chosen level by level: the convolutional rivals of UTNetV2, and every step from them to it.

With residual blocks at all levels it is the authors' ResUNet, with plain convolutions their UNet; attention at some of
the levels gives the variants of the paper's ablations (Fig. 4C and Fig. 8), up to UTNetV2 itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from utnetv2_fast.models.config import Blocks, FiveLevelConfig, check_map_size
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.task import Task
from utnetv2_fast.nn.bidirectional_attention import BidirectionalAttentionBlock
from utnetv2_fast.nn.convolution import ConvNormAct, MBConv, Perceptron, ResidualBlock, make_conv
from utnetv2_fast.nn.efficient_attention import (
    AttendingSkipConnection,
    EfficientAttention,
    IdentityAttention,
    Reduction,
    TokenBlock,
)
from utnetv2_fast.nn.semantic_map import SemanticMapFusion, SemanticMapGeneration
from utnetv2_fast.nn.stages import (
    AttentionGate,
    PatchMerging,
    ProjectedSkipConnection,
    SkipConnection,
    Stem,
    resize_like,
)

ConvolutionalBlock = Literal["plain", "residual"]
Block = Literal["plain", "residual", "efficient", "efficient-conv", "interleaved", "bidirectional", "identity"]
_CONVOLUTIONAL = ("plain", "residual")
_TAKE_ANY_CHANNELS = (*_CONVOLUTIONAL, "interleaved")
_PER_LEVEL = tuple[Block, Block, Block, Block]
Configure = Callable[[Task, int], "HybridConfig"]  # a task and a width, which some disregard


class FusionConfig(BaseModel):
    """Of the multi-scale fusion of semantic maps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: PositiveInt
    heads: PositiveInt
    blocks: Blocks

    @model_validator(mode="after")
    def _sizes_agree(self) -> FusionConfig:
        if self.channels % self.heads:
            raise ValueError(f"channels {self.channels} of the fusion must divide by its {self.heads} heads")
        return self


class HybridConfig(FiveLevelConfig):
    """What a block is:

    plain           convolution, norm, ReLU (two make UNet's double convolution)
    residual        ResUNet's pre-activation block
    efficient       efficient attention with linear projections, and a perceptron
    efficient-conv  the same with convolutional projections, and MBConv
    interleaved     UTNetV1's: the same as `efficient`, with a residual block in front of the first of a level; in
                    the decoder skipped tokens attend to coarse ones and all its blocks are residual
    bidirectional   UTNetV2's: B-MHA and MBConv
    identity        UTNetV2's with B-MHA's projections and nothing mixed between them

    And what a skeleton is:

    resunet         max pooling; where `reduce_skip`, coarse maps are projected to the channels of the skipped ones
                    before both are concatenated
    utnetv2         patch merging; where `reduce_skip`, the concatenation is normalised and reduced
    """

    architecture: Literal["hybrid"] = "hybrid"
    skeleton: Literal["resunet", "utnetv2"]
    stem: ConvolutionalBlock = Field(description="kind of the blocks of level 0")
    kinds: _PER_LEVEL = Field(description="of the blocks of levels 1 to 4")
    blocks: tuple[Blocks, Blocks, Blocks, Blocks] = Field(description="how many, at levels 1 to 4")
    heads: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        description="attention heads of levels 1 to 4; convolutional levels have none and ignore theirs"
    )
    map_size: tuple[PositiveInt, ...] = Field(
        description="of the semantic map, or of the keys and values of efficient attention"
    )
    expansion: PositiveInt = Field(description="widening of the feed-forward networks")
    reduce_skip: bool
    gates: bool = Field(False, description="attention gates on the skip connections")
    reduction: Reduction = Field("area", description="how keys and values of efficient attention are interpolated")
    relative_position: bool = Field(False, description="add a bias for the relative position to the scores of B-MHA")
    fusion: FusionConfig | None = Field(None, description="of the semantic maps of all levels that have one")

    def kind(self, level: int) -> Block:
        return self.stem if level == 0 else self.kinds[level - 1]

    def has_map(self, level: int) -> bool:
        """Whether the blocks of this level exchange information with a semantic map."""
        return self.kind(level) == "bidirectional"

    @model_validator(mode="after")
    def _sizes_agree(self) -> HybridConfig:
        check_map_size(self.map_size, self.dimensions)
        for level in (1, 2, 3, 4):
            channels, heads = self.channels[level], self.heads[level - 1]
            if self.kind(level) not in _CONVOLUTIONAL and channels % heads:
                raise ValueError(f"channels {channels} of level {level} must divide by its {heads} heads")
        if self.relative_position and "bidirectional" not in self.kinds:
            raise ValueError(f"relative_position is for bidirectional blocks, got {self.kinds}")
        if self.fusion is not None and not (self.has_map(3) and self.has_map(4)):
            raise ValueError(f"fusion needs maps to fuse, bidirectional blocks at levels 3 and 4, got {self.kinds}")
        return self


def _make_block(
    config: HybridConfig, level: int, in_channels: int, *, update_map: bool = False, kind: Block | None = None
) -> nn.Module:
    """One block of `level`: token map -> token map, or with a semantic map beside each."""
    kind, channels, kernel_size = kind or config.kind(level), config.channels[level], config.kernel_sizes[level]
    norm, impl, dimensions = config.norm, config.impl, config.dimensions
    if kind == "plain":
        return ConvNormAct(in_channels, channels, kernel_size, norm)
    if kind == "residual":
        return ResidualBlock(in_channels, channels, kernel_size, norm, impl=impl)
    heads = config.heads[level - 1]
    if kind == "bidirectional":
        return BidirectionalAttentionBlock(
            in_channels,
            channels,
            heads,
            kernel_size,
            config.expansion,
            norm,
            update_map=update_map,
            positions=config.map_size if config.relative_position else None,
            impl=impl,
        )
    if kind == "identity":
        attention: EfficientAttention | IdentityAttention = IdentityAttention(
            in_channels, channels, kernel_size, impl=impl
        )
    else:
        attention = EfficientAttention(
            in_channels,
            channels,
            heads,
            kernel_size,
            config.map_size,
            reduction=config.reduction,
            convolve=kind == "efficient-conv",
            impl=impl,
        )
    feed_forward: MBConv | Perceptron
    if kind in ("efficient", "interleaved"):
        feed_forward = Perceptron(channels, dimensions, config.expansion, norm)
    else:
        feed_forward = MBConv(channels, kernel_size, config.expansion, norm, impl=impl)
    return TokenBlock(in_channels, channels, attention, feed_forward, dimensions, norm, impl=impl)


def _make_blocks(
    config: HybridConfig, level: int, in_channels: int, *, last_updates_map: bool, kind: Block | None = None
) -> nn.ModuleList:
    count = 2 if level == 0 else config.blocks[level - 1]
    return nn.ModuleList(
        _make_block(
            config,
            level,
            in_channels if i == 0 else config.channels[level],
            update_map=last_updates_map or i < count - 1,
            kind=kind,
        )
        for i in range(count)
    )


def _make_encoder_blocks(config: HybridConfig, level: int, in_channels: int, *, map_is_used: bool) -> nn.ModuleList:
    if config.kind(level) != "interleaved":
        return _make_blocks(config, level, in_channels, last_updates_map=map_is_used)
    blocks = _make_blocks(config, level, config.channels[level], last_updates_map=False)
    return nn.ModuleList([_make_block(config, level, in_channels, kind="residual"), *blocks])


def _make_decoder_blocks(
    config: HybridConfig, level: int, in_channels: int, *, last_updates_map: bool
) -> nn.ModuleList:
    kind: Block = "residual" if config.kind(level) == "interleaved" else config.kind(level)
    return _make_blocks(config, level, in_channels, last_updates_map=last_updates_map, kind=kind)


def _run(blocks: nn.ModuleList, x: Tensor, semantic_map: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The blocks one after the other; with a semantic map each passes one on."""
    for block in blocks:
        if semantic_map is None:
            x = block(x)
        else:
            x, semantic_map = block(x, semantic_map)
    return x, semantic_map


class _DownStage(nn.Module):
    """Down-sampling, the semantic map's generation where there is one, blocks: x -> (token map, map or None)."""

    def __init__(self, config: HybridConfig, level: int, *, map_is_used: bool) -> None:
        super().__init__()
        c, kernel_size, scale = config.channels, config.kernel_sizes[level], config.scales[level - 1]
        in_channels = c[level - 1]
        self.down: nn.Module
        if config.skeleton == "utnetv2":
            self.down = PatchMerging(in_channels, c[level], scale, kernel_size, config.norm, impl=config.impl)
            in_channels = c[level]
        else:
            self.down = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[config.dimensions](scale)
            if config.kind(level) not in _TAKE_ANY_CHANNELS:  # the others expect those of their level
                self.down = nn.Sequential(self.down, make_conv(in_channels, c[level], (1,) * config.dimensions))
                in_channels = c[level]
        self.map_generation: SemanticMapGeneration | None = None
        if config.has_map(level):
            tokens = torch.Size(config.map_size).numel()
            self.map_generation = SemanticMapGeneration(c[level], tokens, kernel_size, impl=config.impl)
        self.blocks = _make_encoder_blocks(config, level, in_channels, map_is_used=map_is_used)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.down(x)
        return _run(self.blocks, x, None if self.map_generation is None else self.map_generation(x))


class _UpStage(nn.Module):
    """Skip connection for the maps there are, then blocks: x, skip, map, skipped map -> (token map, map or None)."""

    def __init__(self, config: HybridConfig, level: int, *, last_updates_map: bool) -> None:
        super().__init__()
        c, dimensions = config.channels, config.dimensions
        coarse = c[level + 1]
        self.gate = AttentionGate(coarse, c[level], dimensions, config.norm) if config.gates else None
        self.skip: AttendingSkipConnection | ProjectedSkipConnection | SkipConnection
        if config.kind(level) == "interleaved":
            self.skip = AttendingSkipConnection(
                coarse,
                c[level],
                config.heads[level - 1],
                config.map_size,
                config.expansion,
                config.norm,
                reduction=config.reduction,
                impl=config.impl,
            )
        elif config.skeleton == "resunet" and config.reduce_skip:
            self.skip = ProjectedSkipConnection(coarse, c[level], dimensions)
        else:
            self.skip = SkipConnection(
                coarse, c[level], c[level], dimensions, config.norm, reduce=config.reduce_skip, impl=config.impl
            )
        self.map_reduce: nn.Module | None = None
        if config.has_map(level) and config.has_map(level + 1):
            self.map_reduce = make_conv(coarse + c[level], c[level], (1,))
        self.blocks = _make_decoder_blocks(config, level, self.skip.out_channels, last_updates_map=last_updates_map)

    def forward(
        self, x: Tensor, skip: Tensor, semantic_map: Tensor | None, skip_map: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.gate is not None:
            skip = self.gate(x, skip)
        if self.map_reduce is not None:
            assert semantic_map is not None
            assert skip_map is not None
            skip_map = self.map_reduce(torch.cat([semantic_map, skip_map], dim=1))
        return _run(self.blocks, self.skip(x, skip), skip_map)


class HybridUNet(SegmentationNetwork[HybridConfig]):
    """Five levels of such blocks; the auxiliary logits come from level 2 of the decoder, as UTNetV2's do."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        c, k = config.channels, config.kernel_sizes
        self.stem: nn.Module
        if config.stem == "plain":
            self.stem = nn.Sequential(
                ConvNormAct(config.in_channels, c[0], k[0], config.norm), ConvNormAct(c[0], c[0], k[0], config.norm)
            )
        else:
            self.stem = Stem(config.in_channels, c[0], k[0], config.norm, impl=config.impl)
        # The decoder of its own level reads a map; that of the lowest level only the level above it can.
        self.down = nn.ModuleList(
            _DownStage(config, level, map_is_used=level < 4 or config.has_map(3)) for level in (1, 2, 3, 4)
        )
        self.map_fusion: SemanticMapFusion | None = None
        if config.fusion is not None:
            channels = [c[level] for level in (1, 2, 3, 4) if config.has_map(level)]
            fusion = config.fusion
            self.map_fusion = SemanticMapFusion(channels, fusion.channels, fusion.heads, fusion.blocks)
        self.up = nn.ModuleList(
            _UpStage(config, level, last_updates_map=config.has_map(level) and config.has_map(level - 1))
            for level in (3, 2, 1, 0)
        )
        ones = (1,) * config.dimensions
        self.head = make_conv(c[0], config.num_classes, ones, bias=True)
        self.auxiliary_head = make_conv(c[2], config.num_classes, ones, bias=True) if config.deep_supervision else None

    def forward_padded(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        image, x = x, self.stem(x)
        skips: list[Tensor] = [x]
        maps: list[Tensor | None] = [None]
        for stage in self.down:
            x, semantic_map = stage(x)
            skips.append(x)
            maps.append(semantic_map)
        maps = self._fused(maps)
        auxiliary, semantic_map = x, maps[4]
        for level, stage in zip((3, 2, 1, 0), self.up, strict=True):
            x, semantic_map = stage(x, skips[level], semantic_map, maps[level])
            if level == 2:
                auxiliary = x
        logits = self.head(x)
        if self.auxiliary_head is not None and self.training:
            return logits, resize_like(self.auxiliary_head(auxiliary), image)
        return logits

    def _fused(self, maps: list[Tensor | None]) -> list[Tensor | None]:
        """The maps of all levels, those that there are after their fusion."""
        if self.map_fusion is None:
            return maps
        fused = iter(self.map_fusion([semantic_map for semantic_map in maps if semantic_map is not None]))
        return [None if semantic_map is None else next(fused) for semantic_map in maps]


# Kinds of the blocks at levels 1 to 4.
_KINDS: dict[Block, _PER_LEVEL] = {
    "plain": ("plain",) * 4,
    "residual": ("residual",) * 4,
    "efficient": ("residual", "efficient", "efficient", "efficient"),
    "efficient-conv": ("residual", "efficient-conv", "efficient-conv", "efficient-conv"),
    "interleaved": ("interleaved",) * 4,
    "bidirectional": ("residual", "bidirectional", "bidirectional", "bidirectional"),
    "identity": ("residual", "identity", "identity", "identity"),
}


def _hybrid(
    task: Task, channels: tuple[int, ...], kinds: _PER_LEVEL, *, fuse: bool = False, **changes: Any
) -> HybridConfig:
    """With residual blocks at level 0, heads and expansion of the preset, and as many blocks as it has at a level."""
    preset = task.fields
    fields = five_levels(task, channels) | {
        "skeleton": "utnetv2",
        "stem": "residual",
        "kinds": kinds,
        "blocks": (2, *preset["blocks"]),
        "heads": (_heads_of_level_1(task), *preset["heads"]),
        "map_size": preset["map_size"],
        "expansion": preset["expansion"],
        "reduce_skip": preset["reduce_skip"],
    }
    if fuse:
        fields["fusion"] = FusionConfig(
            channels=preset["fusion_channels"], heads=preset["fusion_heads"], blocks=preset.get("fusion_blocks", 2)
        )
    return HybridConfig(**fields | changes)


def five_levels(task: Task, channels: tuple[int, ...]) -> dict[str, Any]:
    """The fields that all networks of five levels have, as `task` has them."""
    return {
        "dimensions": task.dimensions,
        "in_channels": task.in_channels,
        "num_classes": task.num_classes,
        "channels": channels,
        "scales": task.scales,
        "kernel_sizes": task.kernel_sizes,
        "norm": task.fields["norm"],
        "deep_supervision": task.fields.get("deep_supervision", True),
    }


def _heads_of_level_1(task: Task) -> int:
    """Where UTNetV2 has no attention: heads as wide as those of level 2."""
    _, level_1, level_2, *_ = task.fields["channels"]
    return max(1, level_1 * task.fields["heads"][0] // level_2)


def scaled_channels(task: Task, width: int) -> tuple[int, ...]:
    """The preset's channels in proportion, so that level 0 has `width`; they still divide by their heads."""
    channels = [c * width // task.fields["channels"][0] for c in task.fields["channels"]]
    heads = (1, _heads_of_level_1(task), *task.fields["heads"])
    return tuple(max(c // h, 1) * h for c, h in zip(channels, heads, strict=True))


# ResUNet's skeleton has two blocks at every level.
_RESUNET: dict[str, Any] = {"skeleton": "resunet", "blocks": (2, 2, 2, 2)}
# Per axis. UTNet's keys and values have 8 x 8 tokens; in a volume 4 x 4 x 4 are as many.
_REDUCED = {2: 8, 3: 4}


def convolutional(stem: ConvolutionalBlock, **changes: Any) -> Configure:
    """How a U of plain or residual blocks fits a task, of the width it is given."""

    def configure(task: Task, width: int) -> HybridConfig:
        return _hybrid(task, scaled_channels(task, width), _KINDS[stem], **_RESUNET | {"stem": stem} | changes)

    return configure


def configure_utnetv1(task: Task, width: int) -> HybridConfig:
    """UTNet (Gao et al., 2021) with its published blocks, one of each kind at a level, of the width it is given.

    Left out is its bias for relative positions, which the fused attention cannot add; UTNetV2 gained nothing by one.
    Projections are linear and perceptrons have the preset's expansion, as UTNetV2's authors describe it; its published
    code projects depthwise-separably. Heads are those of the preset, and it has the auxiliary logits of all networks.
    """
    changes = {"map_size": (_REDUCED[task.dimensions],) * task.dimensions, "reduction": "linear"}
    blocks = {"blocks": (1, 1, 1, 1)}
    return _hybrid(task, scaled_channels(task, width), _KINDS["interleaved"], **_RESUNET | blocks | changes)


def variant(kind: Block, *, size: int | None = None, fuse: bool = False, **changes: Any) -> Configure:
    """UTNetV2's U with other blocks at levels 2 to 4, of the preset's channels.

    `size` of the map on each axis; unless given, that of UTNetV1 for efficient attention, else that of the preset.
    """

    def configure(task: Task, width: int) -> HybridConfig:
        efficient = kind in ("efficient", "efficient-conv")
        per_axis = _REDUCED[task.dimensions] if size is None and efficient else size
        sizes: dict[str, Any] = {} if per_axis is None else {"map_size": (per_axis,) * task.dimensions}
        return _hybrid(task, task.fields["channels"], _KINDS[kind], fuse=fuse, **sizes | changes)

    return configure


def bidirectional_at(level: int) -> Configure:
    """UTNetV2's U with B-MHA blocks at one level and residual ones at the others, of the preset's channels."""

    def configure(task: Task, width: int) -> HybridConfig:
        kinds: Any = tuple("bidirectional" if i == level else "residual" for i in (1, 2, 3, 4))
        return _hybrid(task, task.fields["channels"], kinds)

    return configure
