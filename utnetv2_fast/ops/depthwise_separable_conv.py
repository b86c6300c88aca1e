"""Depthwise-separable convolution: a depthwise convolution, then a pointwise one, nothing between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utnetv2_fast.ops.arguments import autocast_dtype, check_alike, lowered
from utnetv2_fast.ops.dense_conv import dense_conv, dense_conv_backward
from utnetv2_fast.ops.depthwise_conv import check_depthwise, depthwise_conv
from utnetv2_fast.ops.dispatch import Impl, choose


def depthwise_separable_conv(
    x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Convolve every channel with its own kernel, then mix the channels at every position.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W), any strides.
        depthwise_weight: (C, 1, *k), every k odd; stride 1, zero 'same' padding.
        pointwise_weight: (C_out, C, 1, ...), as many ones as `x` has spatial axes.
        impl: backend: "auto" takes the fastest that can run these inputs, a named one runs or raises.

    Returns:
        (B, C_out, *spatial). On a CPU nothing but the arguments is saved for backward.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown `impl`.
        NotImplementedError: the backend named by `impl` cannot run these inputs.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, depthwise_weight, pointwise_weight = (lowered(t, dtype) for t in (x, depthwise_weight, pointwise_weight))
    if pointwise_weight.ndim != x.ndim or pointwise_weight.shape[1:] != (x.shape[1], *[1] * (x.ndim - 2)):
        raise ValueError(
            f"pointwise_weight must be (C_out, C{', 1' * (x.ndim - 2)}) beside x of shape {tuple(x.shape)},"
            f" not of shape {tuple(pointwise_weight.shape)}"
        )
    check_alike("pointwise_weight", pointwise_weight, "x", x)
    if choose("depthwise_separable_conv", impl, (x, depthwise_weight, pointwise_weight)) == "cpu":
        check_depthwise(x, depthwise_weight, None)
        return _DepthwiseSeparableConv.apply(x, depthwise_weight, pointwise_weight)
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(depthwise_conv(x, depthwise_weight, impl=impl), pointwise_weight)


_depthwise = torch.ops.utnetv2_fast.depthwise_conv.default
_depthwise_backward_weight = torch.ops.utnetv2_fast.depthwise_conv_backward_weight.default


class _DepthwiseSeparableConv(torch.autograd.Function):
    """On a CPU what lies between the two convolutions costs less to compute again than its memory is worth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, depthwise_weight, pointwise_weight)
        return dense_conv(_depthwise(x, depthwise_weight, None, "cpu"), pointwise_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, depthwise_weight, pointwise_weight = ctx.saved_tensors
        need_x, need_depthwise, need_pointwise = ctx.needs_input_grad
        grad_between, grad_pointwise = dense_conv_backward(
            grad_out,
            _depthwise(x, depthwise_weight, None, "cpu"),
            pointwise_weight,
            need_x=need_x or need_depthwise,
            need_weight=need_pointwise,
        )
        grad_x = grad_depthwise = None
        if need_x:
            mirrored = depthwise_weight.flip(tuple(range(2, x.ndim)))
            grad_x = _depthwise(grad_between, mirrored, None, "cpu")
        if need_depthwise:
            grad_depthwise = _depthwise_backward_weight(grad_between, x, depthwise_weight, "cpu")
        return grad_x, grad_depthwise, grad_pointwise
