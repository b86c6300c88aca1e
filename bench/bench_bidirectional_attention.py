"""Bidirectional attention at UTNetV2's shapes, on channels-first maps, beside two softmaxes in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from utnetv2_fast.ops import bidirectional_attention

# name: (B, H, n, l, d)
SHAPES = {
    "acdc-2d level 2": (4, 4, 4096, 9, 32),
    "acdc-2d level 4": (4, 16, 256, 9, 32),
    "acdc-3d level 2": (1, 4, 36864, 27, 32),
    "bcv-3d level 3": (1, 8, 4096, 64, 32),
}


def formula(q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ map_q.mT * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ map_v, scores.softmax(-2).mT @ v


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", SHAPES)
def bench_bidirectional_attention(
    name: str,
    mode: str,
    impl: str,
    device: torch.device,
    skip_refused: Callable[..., None],
    time_checked: Callable[..., None],
) -> None:
    b, h, n, l, d = SHAPES[name]
    tokens, maps = torch.randn(b, 2 * h * d, n, device=device), torch.randn(b, 2 * h * d, l, device=device)
    inputs = tuple(t.unflatten(1, (h, d)).mT for pair in (tokens, maps) for t in pair.chunk(2, 1))
    skip_refused(impl, bidirectional_attention, *inputs)
    weights = (torch.randn_like(inputs[0]), torch.randn_like(inputs[2]))

    def results(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        leaves = tuple(t.to(dtype).requires_grad_(mode != "forward") for t in inputs)
        grads = tuple(w.to(dtype) for w in weights)

        def run() -> tuple[Tensor, ...]:
            outputs = function(*leaves)
            return outputs if mode == "forward" else torch.autograd.grad(outputs, leaves, grads)

        return run

    def ours(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return bidirectional_attention(*tensors, impl=impl)

    backward = mode != "forward"
    time_checked(
        results(formula if impl == "eager" else ours, torch.float32),
        results(formula, torch.float64),
        tolerance=1e-4,
        flops=(10 if backward else 3) * 2 * b * h * n * l * d,
        # Forward reads q and v and writes out; backward reads q, v and a gradient and writes two. The maps are small.
        bytes_moved=(8 if backward else 3) * 4 * b * h * n * d,
    )
