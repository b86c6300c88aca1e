"""Normalisation, ReLU and convolution in one: backward computes what lies between them again.

A normalisation is a scale and a shift of every channel of every sample, made of the channel's moments by arithmetic on
(B, C) that autograd differentiates. So batch norm, instance norm, and a gate that another factor multiplies in are one
case, and of all maps only the input is saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from utnetv2_fast import ops
from utnetv2_fast.nn.across_ranks import gather_samples
from utnetv2_fast.ops.arguments import autocast_dtype, lowered
from utnetv2_fast.ops.dense_conv import dense_conv_backward, dense_conv_forward
from utnetv2_fast.ops.depthwise_separable_conv import fuses as fuses_separable
from utnetv2_fast.ops.dispatch import Impl, choose

Moments = tuple[Tensor, Tensor]  # mean and biased variance, (B, C) each

_scale_shift = torch.ops.utnetv2_fast.scale_shift.default
_scale_shift_backward = torch.ops.utnetv2_fast.scale_shift_backward.default
_depthwise_conv = torch.ops.utnetv2_fast.depthwise_conv.default
_depthwise_conv_backward_weight = torch.ops.utnetv2_fast.depthwise_conv_backward_weight.default
_scaled_depthwise_conv = torch.ops.utnetv2_fast.scaled_depthwise_conv.default
_scaled_depthwise_separable_conv = torch.ops.utnetv2_fast.scaled_depthwise_separable_conv.default
_scaled_depthwise_conv_backward_weight = torch.ops.utnetv2_fast.scaled_depthwise_conv_backward_weight.default
_scaled_dense_conv = torch.ops.utnetv2_fast.scaled_dense_conv.default
_scaled_dense_conv_backward_weight = torch.ops.utnetv2_fast.scaled_dense_conv_backward_weight.default


def fuses(norm: nn.Module, x: Tensor, impl: Impl) -> bool:
    """Whether `norm` of `x` and the convolution behind it run as `normalised_conv`, else as the modules they are."""
    return isinstance(norm, _NormBase) and x.ndim in (4, 5) and choose("scale_shift", impl, (x,)) != "reference"


def through_moments(norm: nn.Module, x: Tensor, impl: Impl) -> tuple[Tensor, Moments | None]:
    """`x`, to be used from here on, and its moments; None where `norm` uses the running ones."""
    if isinstance(norm, _BatchNorm) and not norm.training:
        return x, None
    x, mean, variance = ops.through_channel_moments(x, impl=impl)
    return x, (mean, variance)


def scale_and_shift(norm: nn.Module, moments: Moments | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) each, so that `norm` of a map with these moments and the shape of `x` is the map * scale + shift.

    In training mode batch norm's running statistics take a step, as torch's modules let them.
    """
    assert isinstance(norm, _NormBase)
    if isinstance(norm, _BatchNorm):
        mean, variance = _batch_moments(norm, moments, x)
    else:
        assert moments is not None, "only batch norm has running moments"
        mean, variance = moments
        if math.prod(x.shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {tuple(x.shape)}")
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.to(scale.dtype)
    shift = -mean * scale
    if norm.affine:
        shift = shift + norm.bias.to(shift.dtype)
    return scale.expand(x.shape[:2]), shift.expand(x.shape[:2])


def _batch_moments(norm: _BatchNorm, moments: Moments | None, x: Tensor) -> Moments:
    """Mean and variance (C,) that batch norm divides by, in training mode those of the batch."""
    running_mean, running_var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert running_mean is not None
    assert running_var is not None
    assert batches is not None
    if not norm.training:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return running_mean.to(dtype), running_var.to(dtype)
    assert moments is not None
    means, variances = moments
    if isinstance(norm, GlobalBatchNorm):
        means, variances = gather_samples(torch.stack(moments, dim=1)).unbind(1)
    count = len(means) * math.prod(x.shape[2:])
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    with torch.no_grad():
        batches.add_(1)
        factor = 1 / batches.double() if norm.momentum is None else norm.momentum
        running_mean.mul_(1 - factor).add_(factor * mean)
        running_var.mul_(1 - factor).add_(factor * variance * (count / (count - 1)))
    return mean, variance


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of x (B, C, *spatial) whose batch in training is that of all ranks; all must call it together.

    Not torch's SyncBatchNorm, which runs on GPUs only and does not fuse with the convolution behind it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 3:
            raise ValueError(f"expected x (B, C, *spatial), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x, moments = through_moments(self, input, "reference")
        scale, shift = (t.view(*t.shape, *[1] * (x.ndim - 2)) for t in scale_and_shift(self, moments, x))
        return (x * scale + shift).to(x.dtype)


def use_global_batch_norms(model: nn.Module) -> None:
    """Replace every batch norm within `model` by a global one with the same parameters and statistics."""
    for name, child in model.named_children():
        use_global_batch_norms(child)
        if isinstance(child, _BatchNorm):
            norm = GlobalBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            norm.training = child.training
            norm._parameters, norm._buffers = child._parameters, child._buffers
            setattr(model, name, norm)


def normalised_conv(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    depthwise_weight: Tensor | None,
    dense_weight: Tensor | None,
    *,
    relu: bool,
    impl: Impl,
) -> Tensor:
    """Convolve [ReLU of] x * scale + shift depthwise, then densely; None leaves one of the two out.

    Args:
        x: (B, C, *spatial).
        scale, shift: (B, C), float32; float64 for float64.
        depthwise_weight: (C, 1, *k) or None.
        dense_weight: (C_out, C, *k) or None. All k are odd; stride 1, zero 'same' padding.
        impl: backend of everything but the dense convolution, which is the fastest, as is a normalisation within it.

    Returns:
        (B, C_out, *spatial). The dtype is that of the weights, which autocast lowers. For backward nothing but the
        arguments is saved.
    """
    if (dtype := autocast_dtype(x)) is not None:
        depthwise_weight = None if depthwise_weight is None else lowered(depthwise_weight, dtype)
        dense_weight = None if dense_weight is None else lowered(dense_weight, dtype)
    return _NormalisedConv.apply(x, scale, shift, depthwise_weight, dense_weight, relu, impl)


class _NormalisedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        depthwise_weight: Tensor | None,
        dense_weight: Tensor | None,
        relu: bool,
        impl: Impl,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift, depthwise_weight, dense_weight)
        ctx.relu, ctx.impl = relu, impl
        if depthwise_weight is None:
            assert dense_weight is not None
            if _scales_within(x, dense_weight):
                return _scaled_dense_conv(x, scale, shift, relu, dense_weight)
            return dense_conv_forward(_normalised(x, scale, shift, relu, dense_weight.dtype, impl), dense_weight)
        if dense_weight is not None and _is_one_kernel(x, depthwise_weight, dense_weight, impl):
            return _scaled_depthwise_separable_conv(x, scale, shift, relu, depthwise_weight, dense_weight)
        out = _depthwise(x, scale, shift, relu, depthwise_weight, impl)
        return out if dense_weight is None else dense_conv_forward(out, dense_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, depthwise_weight, dense_weight = ctx.saved_tensors
        relu, impl = ctx.relu, ctx.impl
        need_depthwise, need_dense = ctx.needs_input_grad[3:5]
        need_x = any(ctx.needs_input_grad[:3])
        grad_y: Tensor | None
        grad_depthwise = grad_dense = None
        if depthwise_weight is None:
            if _scales_within(x, dense_weight):
                grad_y, _ = dense_conv_backward(grad, x, dense_weight, need_x=need_x, need_weight=False)
                if need_dense:
                    grad_dense = _scaled_dense_conv_backward_weight(grad, x, scale, shift, relu, dense_weight)
            else:
                y = _normalised(x, scale, shift, relu, dense_weight.dtype, impl)
                grad_y, grad_dense = dense_conv_backward(grad, y, dense_weight, need_x=need_x, need_weight=need_dense)
                del y
        else:
            if dense_weight is not None:
                between = _depthwise(x, scale, shift, relu, depthwise_weight, impl)
                grad_between, grad_dense = dense_conv_backward(
                    grad, between, dense_weight, need_x=True, need_weight=need_dense
                )
                del between
                assert grad_between is not None
                grad = grad_between
            grad_y, grad_depthwise = _depthwise_backward(
                grad, x, scale, shift, relu, depthwise_weight, impl, need_x, need_depthwise
            )
        if grad_y is None:
            return None, None, None, grad_depthwise, grad_dense, None, None
        backend = choose("scale_shift", impl, (x,))
        gradients = _scale_shift_backward(grad_y.to(x.dtype), x, scale, shift, relu, backend)
        return (*gradients, grad_depthwise, grad_dense, None, None)


def _is_one_kernel(x: Tensor, depthwise_weight: Tensor, dense_weight: Tensor, impl: Impl) -> bool:
    if x.dtype != depthwise_weight.dtype or any(k > 1 for k in dense_weight.shape[2:]):
        return False
    weights = (depthwise_weight, dense_weight)
    return choose("depthwise_separable_conv", impl, (x, *weights)) == "triton" and fuses_separable(x, *weights)


def _scales_within(x: Tensor, dense_weight: Tensor) -> bool:
    """Whether one kernel normalises and convolves densely."""
    return x.dtype == dense_weight.dtype and choose("dense_conv", "auto", (x, dense_weight)) == "cpu"


def _normalised(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, dtype: torch.dtype, impl: Impl) -> Tensor:
    return _scale_shift(x, scale, shift, relu, choose("scale_shift", impl, (x,))).to(dtype)


def _depthwise(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor, impl: Impl) -> Tensor:
    if x.dtype == weight.dtype:
        return _scaled_depthwise_conv(x, scale, shift, relu, weight, choose("depthwise_conv", impl, (x, weight)))
    y = _normalised(x, scale, shift, relu, weight.dtype, impl)
    return _depthwise_conv(y, weight, None, choose("depthwise_conv", impl, (y, weight)))


def _depthwise_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    weight: Tensor,
    impl: Impl,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of [ReLU of] x * scale + shift and of weight, those of the two that are needed."""
    backend = choose("depthwise_conv", impl, (grad, weight))
    grad_y = grad_weight = None
    if need_weight:
        if x.dtype == weight.dtype:
            grad_weight = _scaled_depthwise_conv_backward_weight(grad, x, scale, shift, relu, weight, backend)
        else:
            y = _normalised(x, scale, shift, relu, weight.dtype, impl)
            grad_weight = _depthwise_conv_backward_weight(grad, y, weight, backend)
    if need_x:
        grad_y = _depthwise_conv(grad, weight.flip(tuple(range(2, x.ndim))), None, backend)
    return grad_y, grad_weight
