"""The operators in plain PyTorch: readable, any device, any dtype; the oracle for every other backend.

Products, softmax and sums run in float32 for float16 and bfloat16 inputs, in the input's own dtype otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast off: its dtypes are chosen, and autocast would lower the float32 products again."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.is_autocast_enabled(device_type):
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return run


def _accurate(*tensors: Tensor) -> list[Tensor]:
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def _laid_out_like(result: Tensor, like: Tensor) -> Tensor:
    """`result` with the dtype and the order of strides of `like`, which has the same shape."""
    target = torch.empty_like(like)
    if result.dtype == target.dtype and result.stride() == target.stride():
        return result
    return target.copy_(result)


@_without_autocast
def bidirectional_attention(
    q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, map_out, column_lse), where column_lse (B, H, l) is the log of the sum over n of exp(S)."""
    q_, v_, map_q_, map_v_ = _accurate(q, v, map_q, map_v)
    scores = _transposed_scores(q_, map_q_, scale)  # (B, H, l, n)
    out = (map_v_.mT @ scores.softmax(-2)).mT
    maximum = scores.amax(-1, keepdim=True)  # (B, H, l, 1)
    exponentials = (scores - maximum).exp()
    total = exponentials.sum(-1, keepdim=True)
    map_out = (exponentials @ v_) / total
    column_lse = (maximum + total.log()).squeeze(-1)
    return _laid_out_like(out, q), _laid_out_like(map_out, map_q), column_lse


@_without_autocast
def bidirectional_attention_backward(
    grad_out: Tensor,
    grad_map_out: Tensor,
    q: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_v: Tensor,
    map_out: Tensor,
    column_lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, v, map_q and map_v, from the scores computed again."""
    q_, v_, map_q_, map_v_ = _accurate(q, v, map_q, map_v)
    grad_out_, grad_map_out_, map_out_ = _accurate(grad_out, grad_map_out, map_out)
    scores = _transposed_scores(q_, map_q_, scale)  # (B, H, l, n)
    rows = scores.softmax(-2)
    columns = (scores - column_lse.unsqueeze(-1)).exp()
    grad_map_v = rows @ grad_out_
    grad_v = (grad_map_out_.mT @ columns).mT
    # Softmax backward: P * (dP - sum(P * dP)). For the columns that sum is <grad_map_out, map_out>, of size l.
    grad_rows = map_v_ @ grad_out_.mT
    grad_columns = grad_map_out_ @ v_.mT
    row_sum = (rows * grad_rows).sum(-2, keepdim=True)
    column_sum = (grad_map_out_ * map_out_).sum(-1, keepdim=True)
    grad_scores = scale * (rows * (grad_rows - row_sum) + columns * (grad_columns - column_sum))
    return (
        _laid_out_like((map_q_.mT @ grad_scores).mT, q),
        _laid_out_like(grad_v, v),
        _laid_out_like(grad_scores @ q_, map_q),
        _laid_out_like(grad_map_v, map_v),
    )


@_without_autocast
def token_attention(q: Tensor, map_q: Tensor, map_v: Tensor, scale: float) -> Tensor:
    """softmax(S, over l) @ map_v: the half of bidirectional attention that updates the token map."""
    q_, map_q_, map_v_ = _accurate(q, map_q, map_v)
    rows = _transposed_scores(q_, map_q_, scale).softmax(-2)  # (B, H, l, n)
    return _laid_out_like((map_v_.mT @ rows).mT, q)


@_without_autocast
def token_attention_backward(
    grad_out: Tensor, q: Tensor, map_q: Tensor, map_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, map_q and map_v, from the scores computed again."""
    grad_out_, q_, map_q_, map_v_ = _accurate(grad_out, q, map_q, map_v)
    rows = _transposed_scores(q_, map_q_, scale).softmax(-2)  # (B, H, l, n)
    grad_rows = map_v_ @ grad_out_.mT
    grad_scores = scale * rows * (grad_rows - (rows * grad_rows).sum(-2, keepdim=True))
    return (
        _laid_out_like((map_q_.mT @ grad_scores).mT, q),
        _laid_out_like(grad_scores @ q_, map_q),
        _laid_out_like(rows @ grad_out_, map_v),
    )


def _transposed_scores(q: Tensor, map_q: Tensor, scale: float) -> Tensor:
    """S^T (B, H, l, n): with n, the long axis, contiguous, both softmaxes run over long vectors."""
    return (scale * map_q) @ q.mT


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance), (B, C) each, the variance biased."""
    (x_,) = _accurate(x)
    variance, mean = torch.var_mean(x_, dim=_spatial_axes(x), correction=0)
    return mean, variance


def channel_moments_backward(
    grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, other: Tensor | None
) -> Tensor:
    """Gradient of x: that of its moments, and `other`, which it has from elsewhere."""
    (x_,) = _accurate(x)
    positions = math.prod(x.shape[2:])
    slope, offset = 2 * grad_variance / positions, grad_mean / positions
    grad_x = _over_positions(slope, x) * (x_ - _over_positions(mean, x)) + _over_positions(offset, x)
    return _laid_out_like(grad_x if other is None else grad_x + other, x)


@_without_autocast
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    padding = tuple(k // 2 for k in weight.shape[2:])
    return _laid_out_like(convolution(x, weight, bias, padding=padding, groups=x.shape[1]), x)


@_without_autocast
def depthwise_conv_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight. (That of x is `depthwise_conv` of `grad_out` with the kernel mirrored.)

    torch has no depthwise kernel for this in 3D: on a CPU it takes ten times as long as its planes do one by one. So
    tap t of the depth axis is the 2D gradient over all pairs of planes that lie t - k_D // 2 apart.
    """
    if x.ndim == 4:
        return _laid_out_like(_planar_backward_weight(grad_out, x, weight), weight)
    depth, taps = x.shape[2], weight.shape[2]
    gradients = []
    for tap in range(taps):
        shift = tap - taps // 2
        pairs = max(depth - abs(shift), 0)
        x_planes = x.narrow(2, min(max(shift, 0), depth), pairs).transpose(1, 2).flatten(0, 1)  # (B * pairs, C, H, W)
        grad_planes = grad_out.narrow(2, min(max(-shift, 0), depth), pairs).transpose(1, 2).flatten(0, 1)
        gradients.append(_planar_backward_weight(grad_planes, x_planes, weight[:, :, tap]))
    return _laid_out_like(torch.stack(gradients, 2), weight)


def _planar_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _convolution_backward_weight(grad_out, x, weight, groups=x.shape[1])


def _convolution_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    axes = x.ndim - 2
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_out,
        x,
        weight,
        bias_sizes=None,
        stride=[1] * axes,
        padding=[k // 2 for k in weight.shape[2:]],
        dilation=[1] * axes,
        transposed=False,
        output_padding=[0] * axes,
        groups=groups,
        output_mask=[False, True, False],
    )
    return grad_weight


@_without_autocast
def dense_conv_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weight of a dense convolution."""
    if grad_out.stride(1) == x.stride(1) == 1 and all(k == 1 for k in weight.shape[2:]):
        # A product of two matrices (positions, channels), which BLAS computes faster than the convolution does.
        matrices = [t.movedim(1, -1).flatten(0, -2) for t in (grad_out, x)]
        return _laid_out_like((matrices[0].T @ matrices[1]).view(weight.shape), weight)
    if x.ndim == 5 and weight.shape[2] == 1 and x.dtype == torch.bfloat16:
        # The trap of `ops.dense_conv`, which the planes are not.
        grad_planes, planes = (t.movedim(2, 1).flatten(0, 1) for t in (grad_out, x))
        grad_weight = _convolution_backward_weight(grad_planes, planes, weight.squeeze(2), groups=1).unsqueeze(2)
        return _laid_out_like(grad_weight, weight)
    return _laid_out_like(_convolution_backward_weight(grad_out, x, weight, groups=1), weight)


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    (x_,) = _accurate(x)
    y = x_ * _over_positions(scale, x) + _over_positions(shift, x)
    return _laid_out_like(y.relu() if relu else y, x)


def scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift; where the ReLU was active is computed again."""
    grad_y, x_ = _accurate(grad_out, x)
    if relu:
        y = x_ * _over_positions(scale, x) + _over_positions(shift, x)
        grad_y = torch.where(y <= 0, 0, grad_y)
    axes = _spatial_axes(x)
    grad_x = _laid_out_like(grad_y * _over_positions(scale, x), x)
    return grad_x, _laid_out_like((grad_y * x_).sum(axes), scale), _laid_out_like(grad_y.sum(axes), shift)


def scaled_depthwise_conv(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor) -> Tensor:
    return depthwise_conv(scale_shift(x, scale, shift, relu), weight, None)


def scaled_depthwise_conv_backward_weight(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor
) -> Tensor:
    return depthwise_conv_backward_weight(grad_out, scale_shift(x, scale, shift, relu), weight)


def _spatial_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _over_positions(parameter: Tensor, x: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, ..), to be broadcast over the positions of x (B, C, *spatial)."""
    return parameter.reshape(*parameter.shape, *[1] * (x.ndim - 2))
