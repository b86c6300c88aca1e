"""Depthwise convolution at UTNetV2's shapes in both memory formats, beside torch's grouped convolution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utnetv2_fast.ops import depthwise_conv

# name: (B, C, *spatial), kernel
SHAPES = {
    "acdc-2d level 2": ((4, 256, 64, 64), (3, 3)),
    "acdc-3d level 2": ((1, 128, 16, 48, 48), (3, 3, 3)),
    "tiny-3d level 2": ((2, 128, 12, 12, 12), (3, 3, 3)),
}


def formula(x: Tensor, weight: Tensor) -> Tensor:
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(x, weight, padding=[k // 2 for k in weight.shape[2:]], groups=x.shape[1])


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("name", SHAPES)
def bench_depthwise_conv(
    name: str,
    channels_last: bool,
    mode: str,
    impl: str,
    device: torch.device,
    skip_refused: Callable[..., None],
    time_checked: Callable[..., None],
) -> None:
    shape, kernel = SHAPES[name]
    x, weight = torch.randn(shape, device=device), torch.randn(shape[1], 1, *kernel, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    skip_refused(impl, depthwise_conv, x, weight)
    grad = torch.randn_like(x)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        leaves = tuple(t.to(dtype).requires_grad_(mode != "forward") for t in (x, weight))

        def run() -> tuple[Tensor, ...]:
            output = function(*leaves)
            return (output,) if mode == "forward" else torch.autograd.grad(output, leaves, grad.to(dtype))

        return run

    def ours(*tensors: Tensor) -> Tensor:
        return depthwise_conv(*tensors, impl=impl)

    backward = mode != "forward"
    time_checked(
        results(formula if impl == "eager" else ours, torch.float32),
        results(formula, torch.float64),
        tolerance=1e-4,
        flops=(3 if backward else 1) * 2 * x.numel() * math.prod(kernel),
        # Forward reads x and writes the result; the gradients read x and grad and write one more.
        bytes_moved=(5 if backward else 2) * 4 * x.numel(),
    )
