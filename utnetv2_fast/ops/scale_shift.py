"""Scale, shift and ReLU of every channel of every sample: the second half of a normalisation. Function, ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utnetv2_fast.ops.arguments import check_channel_map
from utnetv2_fast.ops.dispatch import Impl, choose, implementation


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, *, relu: bool = False, impl: Impl = "auto") -> Tensor:
    """x * scale + shift, then ReLU if `relu`; the result has the shape, the dtype and the memory layout of `x`.

    Args:
        x: (B, C, *spatial) with 1 to 3 spatial axes, float32, float16, bfloat16 or float64, any strides; B may be 0.
        scale, shift: (B, C), float32; float64 for float64.
        relu: whether negative results become zero.
        impl: backend: "auto" takes the fastest that can run these inputs, a named one runs or raises.

    Autocast changes nothing. For backward nothing but the three arguments is saved.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown `impl`.
        NotImplementedError: the backend named by `impl` cannot run these inputs.
    """
    check_channel_map("x", x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, parameter in (("scale", scale), ("shift", shift)):
        if parameter.shape != x.shape[:2]:
            raise ValueError(f"{name} must be (B, C) = {tuple(x.shape[:2])}, not of shape {tuple(parameter.shape)}")
        if parameter.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} beside x of {x.dtype}, not {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, not {parameter.device}")
    if shift is scale:  # Dynamo refuses an autograd.Function that is given one tensor twice; a view is another tensor
        shift = shift.view_as(shift)
    return _ScaleShift.apply(x, scale, shift, relu, choose("scale_shift", impl, (x, scale, shift)))


torch.library.define(
    "utnetv2_fast::scale_shift",
    "(Tensor x, Tensor scale, Tensor shift, bool relu, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::scale_shift_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, bool relu, str impl)"
    " -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("utnetv2_fast::scale_shift", "default")
def _forward(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str) -> Tensor:
    return implementation(impl).scale_shift(x, scale, shift, relu)


@torch.library.register_fake("utnetv2_fast::scale_shift")
def _forward_fake(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.impl("utnetv2_fast::scale_shift_backward", "default")
def _backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(impl).scale_shift_backward(grad_out, x, scale, shift, relu)


@torch.library.register_fake("utnetv2_fast::scale_shift_backward")
def _backward_fake(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(shift)


_forward_op = torch.ops.utnetv2_fast.scale_shift.default
_backward_op = torch.ops.utnetv2_fast.scale_shift_backward.default


class _ScaleShift(torch.autograd.Function):
    """Outside the ops: cheaper than an autograd formula registered with the dispatcher, and the same under compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.relu, ctx.impl = relu, impl
        return _forward_op(x, scale, shift, relu, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward_op(grad_out, *ctx.saved_tensors, ctx.relu, ctx.impl), None, None)
