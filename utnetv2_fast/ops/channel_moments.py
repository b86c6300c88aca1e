"""Mean and variance of every channel of every sample: the first half of a normalisation. Functions, ops, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utnetv2_fast.ops.arguments import check_channel_map
from utnetv2_fast.ops.dispatch import Impl, choose, implementation


def channel_moments(x: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x (B, C, *spatial) over its spatial axes, 1 to 3 of them.

    Args:
        x: float32, float16, bfloat16 or float64, with any strides; B may be 0.
        impl: backend: "auto" takes the fastest that can run these inputs, a named one runs or raises.

    Returns:
        mean, variance: (B, C) each, float32; float64 for float64. Autocast changes nothing.

    Raises:
        ValueError: a shape or dtype that does not fit, or an unknown `impl`.
        NotImplementedError: the backend named by `impl` cannot run these inputs.
    """
    _, mean, variance = through_channel_moments(x, impl=impl)
    return mean, variance


def through_channel_moments(x: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(x, mean, variance), as `channel_moments` has them, for whoever uses `x` as well.

    Used from here, the gradient that `x` gets from its other uses and that of its moments become one in a single pass.
    """
    check_channel_map("x", x)
    through, mean, variance = _ChannelMoments.apply(x, choose("channel_moments", impl, (x,)))
    return through, mean, variance


torch.library.define(
    "utnetv2_fast::channel_moments",
    "(Tensor x, str impl) -> (Tensor mean, Tensor variance)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::channel_moments_backward",
    "(Tensor grad_mean, Tensor grad_variance, Tensor x, Tensor mean, Tensor? other, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("utnetv2_fast::channel_moments", "default")
def _forward(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return implementation(impl).channel_moments(x)


@torch.library.register_fake("utnetv2_fast::channel_moments")
def _forward_fake(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


@torch.library.impl("utnetv2_fast::channel_moments_backward", "default")
def _backward(
    grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, other: Tensor | None, impl: str
) -> Tensor:
    return implementation(impl).channel_moments_backward(grad_mean, grad_variance, x, mean, other)


@torch.library.register_fake("utnetv2_fast::channel_moments_backward")
def _backward_fake(
    grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, other: Tensor | None, impl: str
) -> Tensor:
    return torch.empty_like(x)


_forward_op = torch.ops.utnetv2_fast.channel_moments.default
_backward_op = torch.ops.utnetv2_fast.channel_moments_backward.default


class _ChannelMoments(torch.autograd.Function):
    """Outside the ops: cheaper than an autograd formula registered with the dispatcher, and the same under compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _forward_op(x, impl)
        ctx.save_for_backward(x, mean)
        ctx.impl = impl
        ctx.set_materialize_grads(False)  # `x` may have no other use, and a zero gradient of its size costs a pass
        # Not view_as, which gives a batch of one sample another stride, by which torch no longer sees channels-last.
        return torch.ops.aten.alias.default(x), mean, variance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, other: Tensor | None, grad_mean: Tensor | None, grad_variance: Tensor | None
    ) -> tuple[Tensor | None, None]:
        if grad_mean is None and grad_variance is None:
            return other, None
        x, mean = ctx.saved_tensors
        grad_mean = torch.zeros_like(mean) if grad_mean is None else grad_mean
        grad_variance = torch.zeros_like(mean) if grad_variance is None else grad_variance
        return _backward_op(grad_mean, grad_variance, x, mean, other, ctx.impl), None
