"""Each operator on a small example, against its reference in float64: whether this machine computes what it should."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utnetv2_fast.ops.bidirectional_attention import bidirectional_attention
from utnetv2_fast.ops.channel_moments import channel_moments
from utnetv2_fast.ops.depthwise_conv import depthwise_conv
from utnetv2_fast.ops.depthwise_separable_conv import depthwise_separable_conv
from utnetv2_fast.ops.scale_shift import scale_shift

Operator = Callable[..., Tensor | tuple[Tensor, Tensor | None]]

# Shapes of the tensor arguments: ACDC's in small.
EXAMPLES: dict[Operator, tuple[tuple[int, ...], ...]] = {
    bidirectional_attention: ((1, 4, 260, 32), (1, 4, 260, 32), (1, 4, 27, 32), (1, 4, 27, 32)),
    channel_moments: ((1, 16, 6, 10, 12),),
    depthwise_conv: ((1, 16, 6, 10, 12), (16, 1, 3, 3, 3)),
    depthwise_separable_conv: ((1, 16, 6, 10, 12), (16, 1, 1, 3, 3), (24, 16, 1, 1, 1)),
    scale_shift: ((1, 16, 6, 10, 12), (1, 16), (1, 16)),
}


def example(operator: Operator, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The same random arguments for `operator` at every call, on any device."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        # Parameters of channels, (B, C), are float32 beside narrower maps.
        torch.randn(shape, generator=generator).to(
            device, dtype if len(shape) > 2 else torch.promote_types(dtype, torch.float32)
        )
        for shape in EXAMPLES[operator]
    )


def relative_error(operator: Operator, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of any result or gradient against float64 on the CPU, as a share of its largest value."""
    inputs = example(operator, device, dtype)
    exact = _results_and_gradients(operator, tuple(t.cpu().double() for t in inputs), "reference")
    results = _results_and_gradients(operator, inputs, "auto")
    return max(float((r.cpu().double() - e).abs().max() / e.abs().max()) for r, e in zip(results, exact, strict=True))


def tolerance(dtype: torch.dtype) -> float:
    """What `relative_error` may be: some roundings of the dtype."""
    return 16 * torch.finfo(dtype).eps


def _results_and_gradients(operator: Operator, inputs: tuple[Tensor, ...], impl: str) -> list[Tensor]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    returned = operator(*inputs, impl=impl)
    results = [r for r in (returned if isinstance(returned, tuple) else (returned,)) if r is not None]
    gradients = torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results])
    return [*(r.detach() for r in results), *gradients]
