"""What every operator asks of its tensor arguments, and what autocast makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, not {x.dtype}")


def check_channel_map(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is (B, C, *spatial) with 1 to 3 spatial axes, none but B empty, of a known dtype."""
    if x.ndim not in (3, 4, 5):
        raise ValueError(f"{name} must be (B, C, *spatial) with 1 to 3 spatial axes, not of shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one channel and one position, not the shape {tuple(x.shape)}")
    check_dtype(name, x)


def check_alike(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless `x` has the dtype and the device of `like`."""
    if x.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name}, {like.dtype}, not {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, not {x.device}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast where it is on for the device of `x`, else None."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as autocast passes it to an operator that runs in `dtype`: float64 and integers stay what they are."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)
