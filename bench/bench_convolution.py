"""Convolutions at UTNetV2's shapes, in both memory formats, beside torch's: depthwise, and dense of 3x3 taps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.peers import CHECKED_CHANNELS, convolve, in_format
from utnetv2_fast.ops import dense_conv, depthwise_conv, explain

Shape = tuple[int, ...]

# (B, C, *spatial), kernel: the widest of acdc-3d and bcv-3d, one of acdc-3d's thick slices, then acdc-2d's; small ones.
DEPTHWISE: list[tuple[Shape, Shape]] = [
    ((1, 512, 16, 48, 48), (3, 3, 3)),
    ((1, 256, 32, 32, 32), (3, 3, 3)),
    ((2, 128, 16, 48, 48), (1, 3, 3)),
    ((2, 256, 64, 64), (3, 3)),
    ((1, 1280, 4, 12, 12), (3, 3, 3)),
    ((2, 1024, 16, 16), (3, 3)),
]
# (B, C, *spatial), C_out and kernel: acdc-3d from its thick slices to the deepest map, then acdc-2d.
DENSE: list[tuple[Shape, Shape]] = [
    ((1, 96, 16, 192, 192), (32, 1, 3, 3)),
    ((1, 32, 16, 192, 192), (32, 1, 3, 3)),
    ((1, 64, 16, 96, 96), (64, 1, 3, 3)),
    ((1, 128, 16, 48, 48), (128, 3, 3, 3)),
    ((1, 320, 4, 12, 12), (320, 3, 3, 3)),
    ((2, 32, 256, 256), (32, 3, 3)),
    ((2, 64, 128, 128), (64, 3, 3)),
    ((2, 512, 16, 16), (512, 3, 3)),
]

LAYOUTS = ("channels-first", "channels-last")

Convolution = Callable[[Tensor, Tensor], Tensor]


def by(sizes: Shape) -> str:
    """1x512x16x48x48: a name that `-k` can choose."""
    return "x".join(map(str, sizes))


def compare_convolutions(
    ours: Convolution,
    x: Tensor,
    weight: Tensor,
    layout: str,
    mode: str,
    compiler_refusal: str | None,
    compare: Callable[..., None],
) -> None:
    """Time `ours` beside torch's; of depthwise ones some channels are checked, of dense ones all."""
    grad = torch.randn(x.shape[0], weight.shape[0], *x.shape[2:], device=x.device).to(x.dtype)
    formats = {name: tuple(in_format(t, name == "channels-last") for t in (x, grad)) for name in LAYOUTS}
    backward, depthwise = mode != "forward", weight.shape[1] == 1

    def results(function: Convolution, layout: str) -> Callable[[], tuple[Tensor, ...]]:
        x, grad = formats[layout]
        leaves = tuple(t.detach().requires_grad_(backward) for t in (x, weight))

        def run() -> tuple[Tensor, ...]:
            output = function(*leaves)
            return torch.autograd.grad(output, leaves, grad) if backward else (output,)

        return run

    def compared(result: Tensor) -> Tensor:
        if not depthwise:
            return result
        channel_axis = 0 if result.shape == weight.shape else 1
        return result.narrow(channel_axis, x.shape[1] - CHECKED_CHANNELS, CHECKED_CHANNELS)

    torch._dynamo.reset()
    other = next(name for name in formats if name != layout)
    eager = results(convolve, layout)
    if depthwise:
        checked = tuple(t[-CHECKED_CHANNELS:] if t is weight else t[:, -CHECKED_CHANNELS:] for t in (x, weight, grad))
    else:
        checked = (x, weight, grad)
    x_, weight_, grad_ = (t.cpu().double() for t in checked)
    leaves = (x_.requires_grad_(backward), weight_.requires_grad_(backward))
    exact = torch.autograd.grad(convolve(*leaves), leaves, grad_) if backward else (convolve(*leaves),)
    operator = ours.__name__
    compare(
        operator,
        (f"{by(tuple(x.shape))} {_of(weight)} {str(x.dtype).removeprefix('torch.')}", layout, mode),
        explain(operator, formats[layout][0], weight).backend,
        results(ours, layout),
        {
            "eager": [eager],
            "best format": [eager, results(convolve, other)],
            "compile": compiler_refusal or [results(torch.compile(convolve, dynamic=False), layout)],
        },
        tuple(t.detach().to(x.device) for t in exact),
        flops=(3 if backward else 1) * 2 * grad.numel() * math.prod(weight.shape[1:]),
        # Forward reads x and writes the result; the gradients read x and the result's gradient and write that of x.
        bytes_moved=3 * x.nbytes + 2 * grad.nbytes if backward else x.nbytes + grad.nbytes,
        compared=compared,
    )


def _of(weight: Tensor) -> str:
    """The kernel, in front of it the channels that a dense convolution makes."""
    c_out, c_in, *kernel = weight.shape
    return by(tuple(kernel)) if c_in == 1 else f"to {c_out} {by(tuple(kernel))}"


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "kernel"), DEPTHWISE, ids=by)
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
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[1], 1, *kernel, device=device).to(dtype)
    compare_convolutions(depthwise_conv, x, weight, layout, mode, compiler_refusal, compare)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(("shape", "kernel"), DENSE, ids=by)
def bench_dense_conv(
    shape: Shape,
    kernel: Shape,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    compiler_refusal: str | None,
    compare: Callable[..., None],
) -> None:
    """In channels-last, the layout that the kernel takes."""
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(kernel[0], shape[1], *kernel[1:], device=device).to(dtype)
    compare_convolutions(dense_conv, x, weight, "channels-last", mode, compiler_refusal, compare)
