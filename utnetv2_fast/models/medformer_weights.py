"""From the state dict of the authors' published network (MedFormer) to ours.

Two things differ besides names. Their heads interleave, channel c of a projection being component c // H of head c % H;
ours are contiguous, so the channels that carry heads are permuted (in the map fusion only those that their 2D network
interleaves: the input of its output projection). And their pointwise layers on semantic maps have spatial kernels of
size one; ours are one-dimensional.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from utnetv2_fast.models.config import UTNetV2Config

# Applied in this order to each of the authors' names.
_RENAMES = [
    (r"^inc\.conv1\.", "stem.conv."),
    (r"^inc\.conv2\.", "stem.block."),
    (r"^down1\.conv_blocks\.", "conv_down.blocks."),
    (r"^down1\.", "conv_down."),
    (r"^down2\.", "down.0."),
    (r"^down3\.", "down.1."),
    (r"^down4\.", "down.2."),
    (r"^up1\.", "up.0."),
    (r"^up2\.", "up.1."),
    (r"^up3\.conv_blocks\.", "conv_up.0.blocks."),
    (r"^up3\.", "conv_up.0."),
    (r"^up4\.conv_blocks\.", "conv_up.1.blocks."),
    (r"^up4\.", "conv_up.1."),
    (r"^outc\.", "head."),
    (r"^aux_out\.", "auxiliary_head."),
    (r"^((?:conv_)?up\.\d\.)(reduction|norm)\.", r"\1skip.\2."),
    (r"\.trans_blocks\.blocks\.", ".blocks."),
    (r"\.map_gen\.base_proj\.", ".map_generation.base."),
    (r"\.map_gen\.semantic_proj\.", ".map_generation.weight."),
    (r"\.map_reduction\.", ".map_reduce."),
    (r"\.reduction\.", ".reduce."),
    (r"\.norm1\.", ".token_norm."),
    (r"\.norm2\.", ".map_norm."),
    (r"\.attn\.feat_", ".attention.token_"),
    (r"\.attn\.map_", ".attention.map_"),
    (r"\.(depthwise|pointwise)\.weight$", r".\1_weight"),
    (r"\.feedforward\.expand_proj\.", ".feed_forward.expand."),
    (r"\.feedforward\.depthwise\.", ".feed_forward.depthwise."),
    (r"\.feedforward\.pointwise\.", ".feed_forward.project."),
    (r"\.feedforward\.se(?:_block)?\.excitation\.0\.", ".feed_forward.excite.reduce."),
    (r"\.feedforward\.se(?:_block)?\.excitation\.2\.", ".feed_forward.excite.expand."),
    (r"^map_fusion\.in_proj\.", "map_fusion.project_in."),
    (r"^map_fusion\.out_proj\.", "map_fusion.project_out."),
    (r"^map_fusion\.fusion\.layers\.(\d)\.0\.norm\.", r"map_fusion.blocks.\1.attention_norm."),
    (r"^map_fusion\.fusion\.layers\.(\d)\.0\.fn\.to_", r"map_fusion.blocks.\1."),
    (r"^map_fusion\.fusion\.layers\.(\d)\.1\.norm\.", r"map_fusion.blocks.\1.perceptron_norm."),
    (r"^map_fusion\.fusion\.layers\.(\d)\.1\.fn\.", r"map_fusion.blocks.\1."),
]
_UNUSED_BY_AUTHORS = re.compile(r"^up[34]\.map_reduction\.")
_POINTWISE_ON_MAPS = re.compile(r"(attention\.map_(qv|out)|map_reduce|project_(in|out)\.\d)\.weight$")


def rename(name: str) -> str:
    """Our name of the authors' parameter `name`."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def convert_medformer_state_dict(state_dict: Mapping[str, Tensor], config: UTNetV2Config) -> dict[str, Tensor]:
    """The authors' `state_dict` under our names and in our layout, less what gets no gradient in their network."""
    last_block = f"up.1.blocks.{config.blocks[0] - 1}.attention.map_out."
    converted = {}
    for theirs, tensor in state_dict.items():
        name = rename(theirs)
        if _UNUSED_BY_AUTHORS.match(theirs) or name.startswith(last_block):
            continue
        if _POINTWISE_ON_MAPS.search(name):
            tensor = tensor.flatten(2)  # (C_out, C_in, 1, 1[, 1]) -> (C_out, C_in, 1)
        converted[name] = _with_contiguous_heads(name, tensor, config)
    return converted


def _with_contiguous_heads(name: str, tensor: Tensor, config: UTNetV2Config) -> Tensor:
    if config.dimensions == 2 and re.match(r"map_fusion\.blocks\.\d+\.out\.weight", name):
        return _contiguous(tensor, config.fusion_heads, axis=1)
    stage = re.match(r"(down|up)\.(\d)\.blocks\.\d+\.attention\.(\w+)\.(\w+)", name)
    if stage is None:
        return tensor
    side, index, layer, weight = stage[1], int(stage[2]), stage[3], stage[4]
    heads = config.heads[index if side == "down" else 1 - index]
    if layer == "token_qv" and weight == "depthwise_weight":
        return tensor  # in front of the projection that makes the heads
    if layer in ("token_qv", "map_qv"):
        return torch.cat([_contiguous(half, heads, axis=0) for half in tensor.chunk(2)])
    # The output projections: the depthwise kernels sit on head channels, the pointwise weights read them.
    return _contiguous(tensor, heads, axis=0 if weight == "depthwise_weight" else 1)


def _contiguous(tensor: Tensor, heads: int, axis: int) -> Tensor:
    """Reorder `axis` from (component, head) to (head, component)."""
    return tensor.unflatten(axis, (-1, heads)).transpose(axis, axis + 1).flatten(axis, axis + 1)
