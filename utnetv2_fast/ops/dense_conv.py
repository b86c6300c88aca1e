"""Dense convolution, 2D and 3D, stride 1, zero 'same' padding, in the layout of its input throughout.

On a CPU 3x3 taps in planes of channels-last maps in float32, of 16 channels or more, run by Winograd's minimal
filtering (`csrc/winograd_conv.cpp`); other weight gradients have a kernel of ours where torch's is slow, all else is
torch's. Its choice of an algorithm has three holes that are closed here, but for impl="reference": small maps in 3D
come back channels-first from channels-last; a kernel of one tap, which is a product of matrices, then takes twice as
long as that product; and on processors with AMX the weight gradient of a kernel flat in D, in bfloat16 of 96 channels
of 16 x 192 x 192, ends the process or never ends (torch 2.13), which that of the planes does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utnetv2_fast.ops import cpu
from utnetv2_fast.ops.arguments import autocast_dtype, check_alike, check_dtype, lowered
from utnetv2_fast.ops.dispatch import Impl, choose, implementation


def dense_conv(x: Tensor, weight: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Convolve `x` with all its channels: torch's `F.conv2d` and `F.conv3d` of stride 1 and 'same' padding.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W), any strides.
        weight: (C_out, C, *k), every k odd.
        impl: backend: "auto" takes the fastest that can run these inputs, a named one runs or raises. "cpu" takes 3x3
            taps in planes and maps whose channels lie side by side.

    Tensors are float32, float16, bfloat16 or float64, all of one dtype on one device. B may be 0.

    Returns:
        (B, C_out, *spatial), channels-last where `x` is. Differentiable once on a CPU. Winograd's filtering shares sums
        among 4 x 4 positions: what is infinite or NaN in `x` makes NaN one position further than its taps reach.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown `impl`.
        NotImplementedError: the backend named by `impl` cannot run these inputs.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, weight = lowered(x, dtype), lowered(weight, dtype)
    _check(x, weight)
    backend = choose("dense_conv", impl, (x, weight))
    if impl == "reference" or x.device.type != "cpu":
        return _by_torch(x, weight)
    return _DenseConv.apply(x, weight, backend)


def dense_conv_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Gradient of `weight`, in its shape and memory layout, of the convolution of `x` whose result has `grad_out`.

    For the backward of modules that compute more than a convolution; it has no derivative of its own.

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
    _check(x, weight)
    expected = (x.shape[0], weight.shape[0], *x.shape[2:])
    if grad_out.shape != expected:
        raise ValueError(f"grad_out must be of shape {expected}, not {tuple(grad_out.shape)}")
    check_alike("grad_out", grad_out, "x", x)
    backend = choose("dense_conv_backward_weight", impl, (grad_out, x, weight))
    return _backward_weight_op(grad_out, x, weight, backend)


def _check(x: Tensor, weight: Tensor) -> None:
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
    check_dtype("x", x)
    check_alike("weight", weight, "x", x)


# The convolution that only the CPU's kernel has.
torch.library.define(
    "utnetv2_fast::dense_conv", "(Tensor x, Tensor weight) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "utnetv2_fast::dense_conv_backward_weight",
    "(Tensor grad_out, Tensor x, Tensor weight, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
# The same of y = [ReLU of] x * scale + shift, scale and shift (B, C) as of `scale_shift`, for modules that normalise in
# front of the convolution and differentiate the two together.
torch.library.define(
    "utnetv2_fast::scaled_dense_conv",
    "(Tensor x, Tensor scale, Tensor shift, bool relu, Tensor weight) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "utnetv2_fast::scaled_dense_conv_backward_weight",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, bool relu, Tensor weight) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("utnetv2_fast::dense_conv", "default")
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return implementation("cpu").dense_conv(x, weight)


@torch.library.register_fake("utnetv2_fast::dense_conv")
def _forward_fake(x: Tensor, weight: Tensor) -> Tensor:
    return cpu.empty_channels_last(x, weight.shape[0])


@torch.library.impl("utnetv2_fast::dense_conv_backward_weight", "default")
def _backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return implementation(impl).dense_conv_backward_weight(grad_out, x, weight)


@torch.library.register_fake("utnetv2_fast::dense_conv_backward_weight")
def _backward_weight_fake(grad_out: Tensor, x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return torch.empty_like(weight)


@torch.library.impl("utnetv2_fast::scaled_dense_conv", "default")
def _scaled_forward(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor) -> Tensor:
    return implementation("cpu").scaled_dense_conv(x, scale, shift, relu, weight)


@torch.library.register_fake("utnetv2_fast::scaled_dense_conv")
def _scaled_forward_fake(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor) -> Tensor:
    return cpu.empty_channels_last(x, weight.shape[0])


@torch.library.impl("utnetv2_fast::scaled_dense_conv_backward_weight", "default")
def _scaled_backward_weight(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor
) -> Tensor:
    return implementation("cpu").scaled_dense_conv_backward_weight(grad_out, x, scale, shift, relu, weight)


@torch.library.register_fake("utnetv2_fast::scaled_dense_conv_backward_weight")
def _scaled_backward_weight_fake(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor
) -> Tensor:
    return torch.empty_like(weight)


_forward_op = torch.ops.utnetv2_fast.dense_conv.default
_backward_weight_op = torch.ops.utnetv2_fast.dense_conv_backward_weight.default


class _DenseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_weight, _ = ctx.needs_input_grad
        return *dense_conv_backward(grad_out, *ctx.saved_tensors, need_x=need_x, need_weight=need_weight), None


def dense_conv_forward(x: Tensor, weight: Tensor) -> Tensor:
    """`dense_conv` with impl="auto" for autograd functions: of checked arguments, without a derivative."""
    return _convolve(x, weight, choose("dense_conv", "auto", (x, weight)))


def _convolve(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return _forward_op(x, weight) if backend == "cpu" else _by_torch(x, weight)


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
    exchanged = weight.transpose(0, 1)
    ours_x = need_x and x.stride(1) == 1 and choose("dense_conv", "auto", (grad_out, exchanged)) == "cpu"
    ours_weight = need_weight and choose("dense_conv_backward_weight", "auto", (grad_out, x, weight)) == "cpu"
    torchs_x, torchs_weight = need_x and not ours_x, need_weight and not ours_weight
    grad_x = grad_weight = None
    if torchs_x or torchs_weight:
        axes = x.ndim - 2
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
            output_mask=[torchs_x, torchs_weight, False],
        )
    if grad_x is not None:
        grad_x = in_layout_of(x, grad_x)
    if ours_x:
        # The convolution with the taps mirrored and the channels exchanged.
        grad_x = _forward_op(grad_out, exchanged.flip(tuple(range(2, x.ndim))))
    if ours_weight:
        grad_weight = _backward_weight_op(grad_out, x, weight, "cpu")
    return grad_x, grad_weight


def _by_torch(x: Tensor, weight: Tensor) -> Tensor:
    if _is_product(x, weight):
        return F.linear(x.movedim(1, -1), weight.flatten(1)).movedim(-1, 1)
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return in_layout_of(x, convolution(x, weight, padding=_padding(weight)))


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
