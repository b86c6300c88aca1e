"""Bidirectional attention at UTNetV2's shapes in both layouts, beside plain PyTorch and two fused attentions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.peers import attend, attend_twice
from utnetv2_fast.ops import bidirectional_attention, explain

Shape = tuple[int, int, int, int, int]  # B, H, n, l, d

# Every level of every network of the paper; acdc-3d and bcv-3d with the maps of the paper and of the authors' code.
SHAPES: dict[str, list[Shape]] = {
    "acdc-2d": [(2, 4, 4096, 9, 32), (2, 8, 1024, 9, 32), (2, 16, 256, 9, 32)],
    "acdc-3d": [(1, 4, n, l, d) for l in (27, 72) for n, d in ((36864, 32), (4608, 64), (576, 80))],
    "bcv-3d": [(1, h, n, l, 32) for l in (27, 64) for n, h in ((32768, 4), (4096, 8), (512, 10))],
    "lits-3d": [(1, 1, n, 64, d) for n, d in ((32768, 128), (4096, 256), (512, 320))],
}


def laid_out(t: Tensor, layout: str) -> Tensor:
    """(B, H, n, d) with n contiguous, or with d contiguous and the heads side by side."""
    if layout == "channels-first":
        return t.mT.contiguous().mT
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@functools.lru_cache(maxsize=1)
def exact_results(shape: Shape, mode: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], ...]:
    """Inputs, incoming gradients, and the results in float64, all on the CPU; the layouts of a shape share them."""
    b, h, n, l, d = shape
    sizes = ((b, h, n, d), (b, h, n, d), (b, h, l, d), (b, h, l, d))
    inputs = tuple(torch.randn(size).to(dtype) for size in sizes)
    grads = tuple(torch.randn(size).to(dtype) for size in sizes[1:3])
    leaves = tuple(t.double().requires_grad_(mode != "forward") for t in inputs)
    outputs = attend(*leaves)
    if mode != "forward":
        outputs = torch.autograd.grad(outputs, leaves, tuple(g.double() for g in grads))
    return inputs, grads, outputs


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name, shapes in SHAPES.items() for shape in shapes],
    ids=lambda value: value if isinstance(value, str) else "b{}-h{}-n{}-l{}-d{}".format(*value),
)
def bench_bidirectional_attention(
    name: str,
    shape: Shape,
    layout: str,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    compiler_refusal: str | None,
    compare: Callable[..., None],
) -> None:
    b, h, n, l, d = shape
    inputs, grads, exact = (tuple(t.to(device) for t in ts) for ts in exact_results(shape, mode, dtype))
    backward = mode != "forward"

    def results(function: Callable[..., tuple[Tensor, ...]], layout: str) -> Callable[[], tuple[Tensor, ...]]:
        leaves = tuple(laid_out(t, layout).requires_grad_(backward) for t in inputs)
        incoming = tuple(laid_out(g, layout) for g in grads)

        def run() -> tuple[Tensor, ...]:
            outputs = function(*leaves)
            return torch.autograd.grad(outputs, leaves, incoming) if backward else outputs

        return run

    torch._dynamo.reset()
    layouts = [layout, "channels-last" if layout == "channels-first" else "channels-first"]
    eager = [results(attend, each) for each in layouts]
    if compiler_refusal is None and (layout, mode) != ("channels-first", "forward+backward"):
        compiler_refusal = "compiled for channels-first, forward+backward alone: every shape takes ten seconds"
    tokens, maps = inputs[0].numel(), inputs[2].numel()
    compare(
        "bidirectional_attention",
        (f"{name} n{n} l{l} B{b} H{h} d{d} {str(dtype).removeprefix('torch.')}", layout, mode),
        explain(bidirectional_attention, *inputs).backend,
        results(bidirectional_attention, layout),
        {
            "eager": eager[:1],
            "best format": eager,
            "compile": compiler_refusal or [results(torch.compile(attend, dynamic=False), layout)],
            "2 SDPA": [results(attend_twice, each) for each in layouts],
        },
        exact,
        # Products of n x l x d: S and one for each direction; backward S again and six more.
        flops=(10 if backward else 3) * 2 * b * h * n * l * d,
        # Forward reads q and v and writes out; backward reads q, v and a gradient and writes two. The same of the maps.
        bytes_moved=((3 + 5) * (tokens + maps) if backward else 3 * (tokens + maps)) * inputs[0].element_size(),
    )
