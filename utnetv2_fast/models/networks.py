"""Every network by name: UTNetV2 and those it is compared with; how each fits a task, and how it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Discriminator, Tag

from utnetv2_fast.errors import InputError
from utnetv2_fast.models.ablations import VARIANTS
from utnetv2_fast.models.config import NetworkConfig, UTNetV2Config
from utnetv2_fast.models.hybrid import HybridConfig, HybridUNet, configure_utnetv1, convolutional
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.rivals.nnunet import NNUNet, NNUNetConfig, configure_nnunet
from utnetv2_fast.models.rivals.swinunet import SwinUNet, SwinUNetConfig, configure_swinunet
from utnetv2_fast.models.rivals.transunet import (
    R50UNet,
    R50UNetConfig,
    TransUNet,
    TransUNetConfig,
    configure_r50_unet,
    configure_transunet,
)
from utnetv2_fast.models.rivals.unet_plus_plus import UNetPlusPlus, UNetPlusPlusConfig, configure_unet_plus_plus
from utnetv2_fast.models.rivals.unetr import UNETR, UNETRConfig, configure_unetr
from utnetv2_fast.models.rivals.vtunet import VTUNet, VTUNetConfig, configure_vt_unet
from utnetv2_fast.models.task import Task
from utnetv2_fast.models.utnetv2 import UTNetV2


def _architecture(config: Any) -> str:
    """Of a configuration or of what is to become one; a config.yaml may leave it out."""
    if isinstance(config, Mapping):
        return str(config.get("architecture", "utnetv2"))
    return str(getattr(config, "architecture", None))


AnyNetworkConfig = Annotated[
    Annotated[UTNetV2Config, Tag("utnetv2")]
    | Annotated[HybridConfig, Tag("hybrid")]
    | Annotated[NNUNetConfig, Tag("nnunet")]
    | Annotated[UNetPlusPlusConfig, Tag("unet++")]
    | Annotated[R50UNetConfig, Tag("r50-unet")]
    | Annotated[TransUNetConfig, Tag("transunet")]
    | Annotated[SwinUNetConfig, Tag("swinunet")]
    | Annotated[UNETRConfig, Tag("unetr")]
    | Annotated[VTUNetConfig, Tag("vt-unet")],
    Discriminator(_architecture),
]

_CLASSES: dict[str, type[SegmentationNetwork[Any]]] = {
    "utnetv2": UTNetV2,
    "hybrid": HybridUNet,
    "nnunet": NNUNet,
    "unet++": UNetPlusPlus,
    "r50-unet": R50UNet,
    "transunet": TransUNet,
    "swinunet": SwinUNet,
    "unetr": UNETR,
    "vt-unet": VTUNet,
}


class Choice(NamedTuple):
    """A network that can be asked for by name.

    title       as the paper's tables have it
    dimensions  in which it exists
    configure   a task and a width -> its configuration
    width       as published, by dimensions: a number to which its channels are proportional. None: it has the channels
                of the preset, and is given none
    """

    title: str
    dimensions: tuple[int, ...]
    configure: Callable[[Task, int], AnyNetworkConfig]
    width: Mapping[int, int] | None = None


def _utnetv2(task: Task, width: int) -> UTNetV2Config:
    sizes = {"scales": task.scales, "kernel_sizes": task.kernel_sizes}
    channels = {"in_channels": task.in_channels, "num_classes": task.num_classes}
    return UTNetV2Config(**dict(task.fields) | sizes | channels)


_BASE_32 = {2: 32, 3: 32}

NETWORKS: dict[str, Choice] = {
    "utnetv2": Choice("UTNetV2", (2, 3), _utnetv2),
    "unet": Choice("UNet", (2, 3), convolutional("plain"), _BASE_32),
    "unet++": Choice("UNet++", (2,), configure_unet_plus_plus, _BASE_32),
    "attention-unet": Choice("Attention UNet", (2,), convolutional("plain", gates=True, reduce_skip=False), _BASE_32),
    "resunet": Choice("ResUNet", (2, 3), convolutional("residual"), _BASE_32),
    "attention-resunet": Choice("Attn ResUNet", (3,), convolutional("residual", gates=True), _BASE_32),
    "nnunet": Choice("nnUNet", (2, 3), configure_nnunet, _BASE_32),
    "r50-unet": Choice("R50-UNet", (2,), configure_r50_unet, {2: 64}),
    "transunet": Choice("TransUNet", (2,), configure_transunet, {2: 64}),
    "swinunet": Choice("SwinUNet", (2,), configure_swinunet, {2: 32}),
    "unetr": Choice("UNETR", (3,), configure_unetr, {3: 64}),
    "vt-unet": Choice("VT-UNet", (3,), configure_vt_unet, {3: 32}),
    "utnetv1": Choice("UTNetV1", (2, 3), configure_utnetv1, _BASE_32),
    **{name: Choice(title, (2, 3), configure) for name, (title, configure) in VARIANTS.items()},
}


def find_network(name: str, dimensions: int) -> Choice:
    """The network called `name`; InputError naming those there are in 2D or 3D."""
    names = [known for known, choice in NETWORKS.items() if dimensions in choice.dimensions]
    if name not in names:
        raise InputError(f"There is no network {name!r} in {dimensions}D; choose one of {', '.join(names)}.")
    return NETWORKS[name]


def configure_network(name: str, task: Task, *, equal_parameters: bool = False) -> AnyNetworkConfig:
    """The network `name` for `task`, of its published width or with about as many parameters as UTNetV2 has there.

    Raises InputError when there is none of that name, and what the network's own configuration finds wrong.
    """
    choice = find_network(name, task.dimensions)
    if choice.width is None:
        return choice.configure(task, 0)
    if not equal_parameters:
        return choice.configure(task, choice.width[task.dimensions])
    wanted = count_parameters(_utnetv2(task, 0))

    def excess(width: int) -> int:
        return count_parameters(choice.configure(task, width)) - wanted

    high = 2
    while excess(high) < 0:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return choice.configure(task, min((low, high), key=lambda width: abs(excess(width))))


def build_network(config: NetworkConfig) -> SegmentationNetwork[Any]:
    """The network of this configuration with fresh weights, drawn from torch's generator."""
    return _CLASSES[config.architecture](config)


def count_parameters(config: NetworkConfig) -> int:
    """How many numbers are trained."""
    with torch.device("meta"):
        network = build_network(config)
    return sum(parameter.numel() for parameter in network.parameters())
