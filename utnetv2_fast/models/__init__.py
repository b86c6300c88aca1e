"""UTNetV2, its configuration, presets, and the way in for the authors' weights."""

from utnetv2_fast.models.config import UTNetV2Config
from utnetv2_fast.models.presets import PRESETS, Preset, get_preset
from utnetv2_fast.models.utnetv2 import UTNetV2

__all__ = ["PRESETS", "Preset", "UTNetV2", "UTNetV2Config", "get_preset"]
