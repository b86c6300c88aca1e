"""Dense convolution by torch, stride 1, zero 'same' padding, and its gradients, in the layout of the input throughout.

For modules that compute convolutions inside autograd functions of their own. torch's choice of an algorithm has three
holes that these close: small maps in 3D come back channels-first from channels-last; a kernel of one tap, which is a
product of matrices, then takes twice as long as that product; and on processors with AMX the weight gradient of a
kernel flat in D, in bfloat16 of 96 channels of 16 x 192 x 192, ends the process or never ends (torch 2.13), which that
of the planes does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utnetv2_fast.ops.conv_backward_weight import conv_backward_weight
from utnetv2_fast.ops.dispatch import choose


def dense_conv(x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, *spatial), (C_out, C, *k) with odd k -> (B, C_out, *spatial)."""
    if _is_product(x, weight):
        return F.linear(x.movedim(1, -1), weight.flatten(1)).movedim(-1, 1)
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return in_layout_of(x, convolution(x, weight, padding=_padding(weight)))


def dense_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, *, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, those of the two that are needed."""
    if _is_product(x, weight):
        grad_rows, rows = grad_out.movedim(1, -1), x.movedim(1, -1)  # (B, *spatial, C)
        grad_x = (grad_rows @ weight.flatten(1)).movedim(-1, 1) if need_x else None
        grad_weight = None
        if need_weight:
            grad_weight = (grad_rows.flatten(0, -2).mT @ rows.flatten(0, -2)).view(weight.shape)
        return grad_x, grad_weight
    if x.ndim == 5 and weight.shape[2] == 1 and x.dtype == torch.bfloat16:
        grad_x, grad_weight = dense_conv_backward(
            planes(grad_out), planes(x), weight.squeeze(2), need_x=need_x, need_weight=need_weight
        )
        if grad_x is not None:
            grad_x = grad_x.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)
        return grad_x, None if grad_weight is None else grad_weight.unsqueeze(2)
    axes = x.ndim - 2
    backend = choose("conv_backward_weight", "auto", (grad_out, x, weight))
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_out,
        x,
        weight,
        bias_sizes=None,
        stride=[1] * axes,
        padding=_padding(weight),
        dilation=[1] * axes,
        transposed=False,
        output_padding=[0] * axes,
        groups=1,
        output_mask=[need_x, need_weight and backend == "reference", False],
    )
    if need_weight and backend != "reference":
        grad_weight = conv_backward_weight(grad_out, x, weight, impl=backend)  # type: ignore[arg-type]
    return None if grad_x is None else in_layout_of(x, grad_x), grad_weight


def planes(x: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B * D, C, H, W), a view of a map in channels-last."""
    return x.movedim(2, 1).flatten(0, 1)


def _padding(weight: Tensor) -> list[int]:
    return [k // 2 for k in weight.shape[2:]]


def _is_channels_last(x: Tensor) -> bool:
    memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.stride(1) == 1 and x.is_contiguous(memory_format=memory_format)


def _is_product(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution is one product of matrices whose rows are positions, with no copy."""
    return all(k == 1 for k in weight.shape[2:]) and _is_channels_last(x)


def in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """`result`, a convolution of `x` or a gradient of its shape, in channels-last where `x` is."""
    if not _is_channels_last(x):
        return result
    return result.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
