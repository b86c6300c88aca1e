"""Depthwise-separable convolution: a depthwise convolution, then a pointwise one, nothing between them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utnetv2_fast.ops.arguments import autocast_dtype, check_alike, lowered
from utnetv2_fast.ops.cpu import empty_channels_last
from utnetv2_fast.ops.dense_conv import dense_conv_backward, dense_conv_forward
from utnetv2_fast.ops.depthwise_conv import check_depthwise, depthwise_conv
from utnetv2_fast.ops.dispatch import Impl, choose, implementation
from utnetv2_fast.ops.precision import convolutions_in_tf32


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
        (B, C_out, *spatial). For backward nothing but the arguments is saved, except with impl="reference".

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
    backend = choose("depthwise_separable_conv", impl, (x, depthwise_weight, pointwise_weight))
    if backend == "reference":
        convolution = F.conv2d if x.ndim == 4 else F.conv3d
        return convolution(depthwise_conv(x, depthwise_weight, impl=impl), pointwise_weight)
    check_depthwise(x, depthwise_weight, None)
    return _DepthwiseSeparableConv.apply(x, depthwise_weight, pointwise_weight, backend)


def fuses(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> bool:
    """Whether one Triton kernel for both convolutions is faster than two: few taps, few channels out, channels-last.

    In the time that an H200 copies an element in bfloat16, 31 instructions, two kernels read, write and read again what
    lies between the convolutions: 46 instructions an element, 55 with 3x3x3 taps, whose depthwise kernel waits for its
    instructions. The fused kernel has no axis to walk along and takes 2.2 instructions a tap and 4 more, 24 for 9 taps
    but 64 for 27, and that for every block of channels out, of which one kernel's registers hold 256. In full float32
    the product, without tensor cores, outlasts everything else, and BLAS is faster at it.
    """
    taps = math.prod(depthwise_weight.shape[2:])
    if x.dtype == torch.float32 and not convolutions_in_tf32():
        return False
    return taps <= 9 and pointwise_weight.shape[0] <= 256 and x.stride(1) == 1


# The fused forward, which only Triton has, of x and of y = [ReLU of] x * scale + shift, scale and shift (B, C).
torch.library.define(
    "utnetv2_fast::depthwise_separable_conv",
    "(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::scaled_depthwise_separable_conv",
    "(Tensor x, Tensor scale, Tensor shift, bool relu, Tensor depthwise_weight, Tensor pointwise_weight) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("utnetv2_fast::depthwise_separable_conv", "default")
def _fused(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
    return implementation("triton").depthwise_separable_conv(x, depthwise_weight, pointwise_weight)


@torch.library.impl("utnetv2_fast::scaled_depthwise_separable_conv", "default")
def _scaled_fused(
    x: Tensor, scale: Tensor, shift: Tensor, relu: bool, depthwise_weight: Tensor, pointwise_weight: Tensor
) -> Tensor:
    kernels = implementation("triton")
    return kernels.scaled_depthwise_separable_conv(x, scale, shift, relu, depthwise_weight, pointwise_weight)


@torch.library.register_fake("utnetv2_fast::depthwise_separable_conv")
def _fused_fake(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
    return _empty_result(x, pointwise_weight.shape[0])


@torch.library.register_fake("utnetv2_fast::scaled_depthwise_separable_conv")
def _scaled_fused_fake(
    x: Tensor, scale: Tensor, shift: Tensor, relu: bool, depthwise_weight: Tensor, pointwise_weight: Tensor
) -> Tensor:
    return _empty_result(x, pointwise_weight.shape[0])


def _empty_result(x: Tensor, channels: int) -> Tensor:
    """In the layout of a convolution's result, channels-last for channels-last."""
    if x.stride(1) == 1:
        return empty_channels_last(x, channels)
    return x.new_empty((x.shape[0], channels, *x.shape[2:]))


_fused_op = torch.ops.utnetv2_fast.depthwise_separable_conv.default
_depthwise = torch.ops.utnetv2_fast.depthwise_conv.default
_depthwise_backward_weight = torch.ops.utnetv2_fast.depthwise_conv_backward_weight.default


class _DepthwiseSeparableConv(torch.autograd.Function):
    """What lies between the two convolutions costs less to compute again than its memory is worth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(x, depthwise_weight, pointwise_weight)
        ctx.impl = impl
        if impl == "triton" and fuses(x, depthwise_weight, pointwise_weight):
            return _fused_op(x, depthwise_weight, pointwise_weight)
        return dense_conv_forward(_depthwise(x, depthwise_weight, None, impl), pointwise_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, depthwise_weight, pointwise_weight = ctx.saved_tensors
        need_x, need_depthwise, need_pointwise, _ = ctx.needs_input_grad
        grad_between, grad_pointwise = dense_conv_backward(
            grad_out,
            _depthwise(x, depthwise_weight, None, ctx.impl),
            pointwise_weight,
            need_x=need_x or need_depthwise,
            need_weight=need_pointwise,
        )
        grad_x = grad_depthwise = None
        if need_x:
            mirrored = depthwise_weight.flip(tuple(range(2, x.ndim)))
            grad_x = _depthwise(grad_between, mirrored, None, ctx.impl)
        if need_depthwise:
            grad_depthwise = _depthwise_backward_weight(grad_between, x, depthwise_weight, ctx.impl)
        return grad_x, grad_depthwise, grad_pointwise, None
