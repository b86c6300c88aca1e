"""Weights trained on ImageNet, as their authors publish them, for the rivals that start from such; none is downloaded.

`R50+ViT-B_16.npz` of the vision Transformer's authors fits R50-UNet and TransUNet, `swin_tiny_patch4_window7_224.pth`
of Swin's fits SwinUNet and VT-UNet. What these networks add to the Transformer, most of the decoder, begins at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utnetv2_fast.errors import InputError
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.rivals.layers import COLOURS, embedded_channels
from utnetv2_fast.models.rivals.resnet50 import UNITS
from utnetv2_fast.models.rivals.swinunet import SwinUNetConfig
from utnetv2_fast.models.rivals.transunet import TransUNetConfig, resize_positions
from utnetv2_fast.models.rivals.vtunet import VTUNetConfig
from utnetv2_fast.models.rivals.window_attention import WINDOW
from utnetv2_fast.tensor_files import read_numpy_archive, read_torch_archive

Take = Callable[[str], Tensor]


class _Source(NamedTuple):
    """A published file: what it is called, its tensors by name, and how they become those of a network."""

    title: str
    read: Callable[[Path], Mapping[str, Any] | None]
    convert: Callable[[SegmentationNetwork[Any], Take], dict[str, Tensor]]


def check_pretrained(architecture: str, file: Path) -> None:
    """Raises InputError when the network takes no pre-trained weights, or there is no such file."""
    _source(architecture)
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the pre-trained weights as they were published.")


def load_pretrained(network: SegmentationNetwork[Any], file: Path) -> None:
    """Replace the weights of the network that `file` has; the others stay as they are.

    Raises InputError, and leaves the network as it is, for a network that takes none, and for a file that is absent,
    damaged, not the one that this network takes, or of a network of other sizes.
    """
    architecture = network.config.architecture
    check_pretrained(architecture, file)
    source = _source(architecture)
    stored = source.read(file)
    if stored is None:
        raise InputError(f"{file}: damaged, or not {source.title}, which {architecture} takes; download it anew.")
    another = f"not {source.title}, which {architecture} takes; give that file"

    def take(name: str) -> Tensor:
        if name not in stored:
            raise InputError(f"{file}: has no {name}: {another}.")
        return torch.as_tensor(stored[name]).to(torch.float32)

    try:
        weights = source.convert(network, take)
    except (RuntimeError, LookupError, TypeError, ValueError):
        raise InputError(f"{file}: its tensors have other axes: {another}.") from None
    own = network.state_dict()
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"{file}: {name} would have the shape {tuple(tensor.shape)}, this network's has "
                f"{tuple(own[name].shape)}: choose a preset with the network's published size."
            )
    network.load_state_dict(weights, strict=False)


def _source(architecture: str) -> _Source:
    if architecture not in _SOURCES:
        raise InputError(
            f"The network {architecture} takes no pre-trained weights: leave --pretrained out, or train one of "
            f"{', '.join(_SOURCES)}."
        )
    return _SOURCES[architecture]


# --- the vision Transformer with a ResNet ----------------------------------------------------------------------------


def _resnet_weights(network: SegmentationNetwork[Any], take: Take) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}

    def add(own: str, theirs: str, convolution: str, norm: str) -> None:
        weights[f"{own}{convolution}.weight"] = _of_flax_convolution(take(f"{theirs}{convolution}/kernel"))
        for part, name in (("weight", "scale"), ("bias", "bias")):
            weights[f"{own}{norm}.{part}"] = take(f"{theirs}{norm}/{name}").flatten()

    add("resnet.", "", "conv_root", "gn_root")
    for stage, units in enumerate(UNITS):
        for unit in range(units):
            own, theirs = f"resnet.blocks.{stage}.{unit}.", f"block{stage + 1}/unit{unit + 1}/"
            for i in (1, 2, 3):
                add(own, theirs, f"conv{i}", f"gn{i}")
            if unit == 0:
                add(own, theirs, "conv_proj", "gn_proj")
    root = "resnet.conv_root.weight"
    weights[root] = _for_channels(weights[root], embedded_channels(network.config.in_channels))
    return weights


def _vision_transformer_weights(network: SegmentationNetwork[Any], take: Take) -> dict[str, Tensor]:
    config = network.config
    assert isinstance(config, TransUNetConfig)
    weights = _resnet_weights(network, take)
    weights["embedding.weight"] = _of_flax_convolution(take("embedding/kernel"))
    weights["embedding.bias"] = take("embedding/bias")
    positions = take("Transformer/posembed_input/pos_embedding")[:, 1:]  # the first is that of the class token
    side = math.isqrt(positions.shape[1])
    weights["position_embedding"] = resize_positions(positions, (side, side), config.grid)

    def add_norm(own: str, theirs: str) -> None:
        weights[f"{own}.weight"], weights[f"{own}.bias"] = take(f"{theirs}/scale"), take(f"{theirs}/bias")

    def add_linear(own: str, theirs: str, kernel: Tensor) -> None:
        weights[f"{own}.weight"], weights[f"{own}.bias"] = kernel.T, take(f"{theirs}/bias").flatten()

    for i in range(config.blocks):
        own, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        add_norm(f"{own}.attention_norm", f"{theirs}/LayerNorm_0")
        for projection in ("query", "key", "value"):
            kernel = take(f"{attention}/{projection}/kernel").flatten(1)  # (C, H, d)
            add_linear(f"{own}.{projection}", f"{attention}/{projection}", kernel)
        add_linear(f"{own}.out", f"{attention}/out", take(f"{attention}/out/kernel").flatten(0, 1))  # (H, d, C)
        add_norm(f"{own}.perceptron_norm", f"{theirs}/LayerNorm_2")
        for layer, dense in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            kernel = take(f"{theirs}/MlpBlock_3/{dense}/kernel")
            add_linear(f"{own}.perceptron.{layer}", f"{theirs}/MlpBlock_3/{dense}", kernel)
    add_norm("norm", "Transformer/encoder_norm")
    return weights


def _of_flax_convolution(kernel: Tensor) -> Tensor:
    """(H, W, C_in, C_out) -> (C_out, C_in, H, W)."""
    return kernel.permute(3, 2, 0, 1)


def _for_channels(kernel: Tensor, channels: int) -> Tensor:
    """(C_out, 3, *k) of coloured images -> (C_out, C_in, *k): other channels count alike, and as much together."""
    if channels == COLOURS:
        return kernel
    total = kernel.sum(1, keepdim=True)
    return (total / channels).expand(-1, channels, *kernel.shape[2:])


# --- Swin ------------------------------------------------------------------------------------------------------------


def _read_model(file: Path) -> Mapping[str, Tensor] | None:
    """The section `model` of the file, which has the settings of the training beside it."""
    content = read_torch_archive(file)
    model = content.get("model") if isinstance(content, dict) else None
    return model if isinstance(model, dict) and all(isinstance(value, Tensor) for value in model.values()) else None


def _swin_weights(network: SegmentationNetwork[Any], take: Take) -> dict[str, Tensor]:
    """Into the encoder under the same names, and into the blocks of the decoder, mirrored; inflated where it is 3D."""
    config = network.config
    assert isinstance(config, SwinUNetConfig | VTUNetConfig)
    weights = {}
    for own in network.state_dict():
        first, *rest = own.split(".")
        if first in ("patch_embed", "layers", "norm"):
            theirs = own
        elif first == "layers_up" and rest[1] == "blocks":
            theirs = ".".join(("layers", str(3 - int(rest[0])), *rest[1:]))
        else:
            continue
        weight = take(theirs)
        if isinstance(config, VTUNetConfig) and own.endswith("relative_position_bias_table"):
            weight = weight.repeat(2 * WINDOW - 1, 1)  # the same at every offset in depth, the slowest axis
        weights[own] = weight
    kernel = weights["patch_embed.proj.weight"]
    if isinstance(config, VTUNetConfig):
        depth = config.patch[0]
        kernel = _for_channels(kernel, config.in_channels)[:, :, None].repeat(1, 1, depth, 1, 1) / depth
    else:
        kernel = _for_channels(kernel, embedded_channels(config.in_channels))
    return weights | {"patch_embed.proj.weight": kernel}


_VISION_TRANSFORMER = "R50+ViT-B_16.npz"
_SWIN = "swin_tiny_patch4_window7_224.pth"

_SOURCES = {
    "r50-unet": _Source(_VISION_TRANSFORMER, read_numpy_archive, _resnet_weights),
    "transunet": _Source(_VISION_TRANSFORMER, read_numpy_archive, _vision_transformer_weights),
    "swinunet": _Source(_SWIN, _read_model, _swin_weights),
    "vt-unet": _Source(_SWIN, _read_model, _swin_weights),
}
