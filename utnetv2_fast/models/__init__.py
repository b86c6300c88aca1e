"""UTNetV2, its presets, the way in for the authors' weights, and the networks that it is compared with."""

from utnetv2_fast.models.ablations import ABLATIONS
from utnetv2_fast.models.config import NetworkConfig, UTNetV2Config
from utnetv2_fast.models.network import SegmentationNetwork
from utnetv2_fast.models.networks import (
    NETWORKS,
    AnyNetworkConfig,
    build_network,
    configure_network,
    count_parameters,
    find_network,
)
from utnetv2_fast.models.presets import PRESETS, Preset, get_preset
from utnetv2_fast.models.rivals.pretrained import check_pretrained, load_pretrained
from utnetv2_fast.models.task import Task
from utnetv2_fast.models.utnetv2 import UTNetV2

__all__ = [
    "ABLATIONS",
    "NETWORKS",
    "PRESETS",
    "AnyNetworkConfig",
    "NetworkConfig",
    "Preset",
    "SegmentationNetwork",
    "Task",
    "UTNetV2",
    "UTNetV2Config",
    "build_network",
    "check_pretrained",
    "configure_network",
    "count_parameters",
    "find_network",
    "get_preset",
    "load_pretrained",
]
