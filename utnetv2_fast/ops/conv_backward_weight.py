"""The weight's gradient of a dense convolution in 2D and 3D, stride 1, zero 'same' padding: function and torch op.

For the backward of modules that compute more than a convolution; it has no derivative of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utnetv2_fast.ops.arguments import check_alike, check_dtype
from utnetv2_fast.ops.dispatch import Impl, choose, implementation


def conv_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Gradient of `weight`, in its shape and memory layout, of the convolution of `x` whose result has `grad_out`.

    Args:
        grad_out: (B, C_out, *spatial), any strides.
        x: (B, C_in, H, W) or (B, C_in, D, H, W), any strides.
        weight: (C_out, C_in, *k), every k odd; its values do not matter.
        impl: backend: "auto" takes the fastest that can run these inputs, a named one runs or raises.

    Tensors are float32, float16, bfloat16 or float64, all of one dtype on one device. B may be 0.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown `impl`.
        NotImplementedError: the backend named by `impl` cannot run these inputs.
    """
    _check(grad_out, x, weight)
    return _op(grad_out, x, weight, choose("conv_backward_weight", impl, (grad_out, x, weight)))


def _check(grad_out: Tensor, x: Tensor, weight: Tensor) -> None:
    if x.ndim not in (4, 5):
        raise ValueError(f"x must be (B, C, H, W) or (B, C, D, H, W), not of shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one channel and one position, not the shape {tuple(x.shape)}")
    if weight.ndim != x.ndim or weight.shape[0] == 0 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be (C_out, C_in, *k) with C_in = {x.shape[1]} and {x.ndim - 2} axes k for x of shape"
            f" {tuple(x.shape)}, not of shape {tuple(weight.shape)}"
        )
    if any(k % 2 == 0 for k in weight.shape[2:]):
        raise ValueError(f"weight must have odd kernel sizes, not {tuple(weight.shape[2:])}")
    expected = (x.shape[0], weight.shape[0], *x.shape[2:])
    if grad_out.shape != expected:
        raise ValueError(f"grad_out must be of shape {expected}, not {tuple(grad_out.shape)}")
    check_dtype("x", x)
    check_alike("grad_out", grad_out, "x", x)
    check_alike("weight", weight, "x", x)


torch.library.define(
    "utnetv2_fast::conv_backward_weight",
    "(Tensor grad_out, Tensor x, Tensor weight, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("utnetv2_fast::conv_backward_weight", "default")
def _backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return implementation(impl).conv_backward_weight(grad_out, x, weight)


@torch.library.register_fake("utnetv2_fast::conv_backward_weight")
def _backward_weight_fake(grad_out: Tensor, x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return torch.empty_like(weight)


_op = torch.ops.utnetv2_fast.conv_backward_weight.default
