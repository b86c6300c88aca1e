"""Depthwise convolution at UTNetV2's shapes in both memory formats, beside torch's grouped convolution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.peers import CHECKED_CHANNELS, convolve, in_format
from utnetv2_fast.ops import depthwise_conv, explain

Shape = tuple[int, ...]

# (B, C, *spatial), kernel: the widest of acdc-3d and bcv-3d, one of acdc-3d's thick slices, then acdc-2d's; small ones.
SHAPES: list[tuple[Shape, Shape]] = [
    ((1, 512, 16, 48, 48), (3, 3, 3)),
    ((1, 256, 32, 32, 32), (3, 3, 3)),
    ((2, 128, 16, 48, 48), (1, 3, 3)),
    ((2, 256, 64, 64), (3, 3)),
    ((1, 1280, 4, 12, 12), (3, 3, 3)),
    ((2, 1024, 16, 16), (3, 3)),
]


LAYOUTS = ("channels-first", "channels-last")


def by(sizes: Shape) -> str:
    """1x512x16x48x48: a name that `-k` can choose."""
    return "x".join(map(str, sizes))


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "kernel"), SHAPES, ids=by)
def bench_depthwise_conv(
    shape: Shape,
    kernel: Shape,
    layout: str,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    compiler_refusal: str | None,
    compare: Callable[..., None],
) -> None:
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], 1, *kernel, device=device).to(dtype)
    formats = {name: tuple(in_format(t, name == "channels-last") for t in (x, grad)) for name in LAYOUTS}
    backward = mode != "forward"

    def results(function: Callable[..., Tensor], layout: str) -> Callable[[], tuple[Tensor, ...]]:
        x, grad = formats[layout]
        leaves = tuple(t.detach().requires_grad_(backward) for t in (x, weight))

        def run() -> tuple[Tensor, ...]:
            output = function(*leaves)
            return torch.autograd.grad(output, leaves, grad) if backward else (output,)

        return run

    def compared(result: Tensor) -> Tensor:
        channel_axis = 0 if result.shape == weight.shape else 1
        return result.narrow(channel_axis, shape[1] - CHECKED_CHANNELS, CHECKED_CHANNELS)

    torch._dynamo.reset()
    other = next(name for name in formats if name != layout)
    eager = results(convolve, layout)
    checked = tuple(t[-CHECKED_CHANNELS:] if t is weight else t[:, -CHECKED_CHANNELS:] for t in (x, weight, grad))
    x_, weight_, grad_ = (t.cpu().double() for t in checked)
    leaves = (x_.requires_grad_(backward), weight_.requires_grad_(backward))
    exact = torch.autograd.grad(convolve(*leaves), leaves, grad_) if backward else (convolve(*leaves),)
    compare(
        "depthwise_conv",
        (f"{by(shape)} {by(kernel)} {str(dtype).removeprefix('torch.')}", layout, mode),
        explain(depthwise_conv, x, weight).backend,
        results(depthwise_conv, layout),
        {
            "eager": [eager],
            "best format": [eager, results(convolve, other)],
            "compile": compiler_refusal or [results(torch.compile(convolve, dynamic=False), layout)],
        },
        tuple(t.detach().to(device) for t in exact),
        flops=(3 if backward else 1) * 2 * x.numel() * math.prod(kernel),
        # Forward reads x and writes the result; the gradients read x and grad and write one more.
        bytes_moved=(5 if backward else 2) * x.nbytes,
        compared=compared,
    )
