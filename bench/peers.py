"""What our operators are compared with: the same in plain PyTorch, and with the attentions that torch fuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest value, for results that are timed
CHECKED_CHANNELS = 16  # of a depthwise convolution: they do not depend on each other, and torch's float64 is slow


def attend(q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ map_q.mT * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ map_v, scores.softmax(-2).mT @ v


def attend_twice(q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor) -> tuple[Tensor, Tensor]:
    return F.scaled_dot_product_attention(q, map_q, map_v), F.scaled_dot_product_attention(map_q, q, v)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise with a weight (C, 1, *k), else densely."""
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(x, weight, padding=[k // 2 for k in weight.shape[2:]], groups=x.shape[1] // weight.shape[1])


def convolve_separably(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(convolve(x, depthwise_weight), pointwise_weight)


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last if channels_last else torch.contiguous_format)
