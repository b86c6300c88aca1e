"""Depthwise convolution in 2D and 3D, stride 1, zero 'same' padding: function, torch ops, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utnetv2_fast.ops.arguments import autocast_dtype, check_alike, check_dtype, lowered
from utnetv2_fast.ops.dispatch import Impl, choose, implementation


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """Convolve every channel with its own kernel; the result has the shape and the memory layout of `x`.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W), any strides.
        weight: (C, 1, *k), every k odd; they may differ, as in (1, 3, 3).
        bias: (C,) or None.
        impl: backend: "auto" takes the fastest that can run these inputs, a named one runs or raises.

    Tensors are float32, float16, bfloat16 or float64, all of one dtype on one device; under autocast they are cast as
    for `torch.nn.functional.conv2d`. B may be 0.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown `impl`.
        NotImplementedError: the backend named by `impl` cannot run these inputs.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, weight = lowered(x, dtype), lowered(weight, dtype)
        bias = None if bias is None else lowered(bias, dtype)
    check_depthwise(x, weight, bias)
    backend = choose("depthwise_conv", impl, (x, weight))
    return _DepthwiseConv.apply(x, weight, bias, backend)


def check_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError naming the argument that does not fit."""
    if x.ndim not in (4, 5):
        raise ValueError(f"x must be (B, C, H, W) or (B, C, D, H, W), not of shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one channel and one position, not the shape {tuple(x.shape)}")
    if weight.ndim != x.ndim or weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        raise ValueError(
            f"weight must be (C, 1, *k) with C = {x.shape[1]} and {x.ndim - 2} axes k for x of shape {tuple(x.shape)},"
            f" not of shape {tuple(weight.shape)}"
        )
    if any(k % 2 == 0 for k in weight.shape[2:]):
        raise ValueError(f"weight must have odd kernel sizes, not {tuple(weight.shape[2:])}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (C,) with C = {weight.shape[0]}, not of shape {tuple(bias.shape)}")
    check_dtype("x", x)
    check_alike("weight", weight, "x", x)
    if bias is not None:
        check_alike("bias", bias, "x", x)


torch.library.define(
    "utnetv2_fast::depthwise_conv",
    "(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::depthwise_conv_backward_weight",
    "(Tensor grad_out, Tensor x, Tensor weight, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("utnetv2_fast::depthwise_conv", "default")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return implementation(impl).depthwise_conv(x, weight, bias)


@torch.library.register_fake("utnetv2_fast::depthwise_conv")
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.impl("utnetv2_fast::depthwise_conv_backward_weight", "default")
def _backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return implementation(impl).depthwise_conv_backward_weight(grad_out, x, weight)


@torch.library.register_fake("utnetv2_fast::depthwise_conv_backward_weight")
def _backward_weight_fake(grad_out: Tensor, x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return torch.empty_like(weight)


# The same of y = [ReLU of] x * scale + shift, scale and shift (B, C) as of `scale_shift`, for modules that normalise in
# front of the convolution and differentiate the two together.
torch.library.define(
    "utnetv2_fast::scaled_depthwise_conv",
    "(Tensor x, Tensor scale, Tensor shift, bool relu, Tensor weight, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::scaled_depthwise_conv_backward_weight",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, bool relu, Tensor weight, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("utnetv2_fast::scaled_depthwise_conv", "default")
def _scaled_forward(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor, impl: str) -> Tensor:
    return implementation(impl).scaled_depthwise_conv(x, scale, shift, relu, weight)


@torch.library.register_fake("utnetv2_fast::scaled_depthwise_conv")
def _scaled_forward_fake(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor, impl: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.impl("utnetv2_fast::scaled_depthwise_conv_backward_weight", "default")
def _scaled_backward_weight(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor, impl: str
) -> Tensor:
    return implementation(impl).scaled_depthwise_conv_backward_weight(grad_out, x, scale, shift, relu, weight)


@torch.library.register_fake("utnetv2_fast::scaled_depthwise_conv_backward_weight")
def _scaled_backward_weight_fake(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor, impl: str
) -> Tensor:
    return torch.empty_like(weight)


_forward_op = torch.ops.utnetv2_fast.depthwise_conv.default
_backward_weight_op = torch.ops.utnetv2_fast.depthwise_conv_backward_weight.default


class _DepthwiseConv(torch.autograd.Function):
    """Outside the ops: cheaper than an autograd formula registered with the dispatcher, and the same under compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.impl = impl
        return _forward_op(x, weight, bias, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        axes = tuple(range(2, x.ndim))
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        # With odd kernels, stride 1 and 'same' padding the gradient of x is the same operator with the kernel mirrored.
        grad_x = _forward_op(grad_out, weight.flip(axes), None, ctx.impl) if need_x else None
        grad_weight = _backward_weight_op(grad_out, x, weight, ctx.impl) if need_weight else None
        grad_bias = grad_out.sum((0, *axes)) if need_bias else None
        return grad_x, grad_weight, grad_bias, None
