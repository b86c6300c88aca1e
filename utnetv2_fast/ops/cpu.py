"""The operators in C++ (`csrc/`), with the signatures of `ops.reference`; `dispatch` says when they can run.

A result has the layout that `torch.empty_like` gives its input, that of a dense convolution channels-last. Nothing is
copied on the way: the kernels take strides, Winograd's those of maps whose channels lie side by side.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from utnetv2_fast.ops.extension import load_extension

Described = tuple[int, int, tuple[int, ...], tuple[int, ...]]

# Channels on either side from which Winograd's filtering pays: its transforms take less than its products.
CHANNELS_OF_WINOGRAD = 16

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/tensor.hpp


def _extension() -> ModuleType:
    extension = load_extension()
    assert extension is not None, "dispatch chooses this backend only where the extension is"
    return extension


def _described(t: Tensor) -> Described:
    """A tensor as the extension takes it."""
    return t.data_ptr(), _DTYPES[t.dtype], tuple(t.shape), t.stride()


def _described_if_any(t: Tensor | None) -> Described | None:
    return None if t is None else _described(t)


def bidirectional_attention(
    q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, map_out = torch.empty_like(q), torch.empty_like(map_q)
    statistics_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    column_lse = map_q.new_empty(map_q.shape[:3], dtype=statistics_dtype)
    inputs, outputs = map(_described, (q, v, map_q, map_v)), map(_described, (out, map_out, column_lse))
    _extension().bidirectional_attention(*inputs, scale, *outputs)
    return out, map_out, column_lse


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
    inputs = map(_described, (grad_out, grad_map_out, q, v, map_q, map_v, map_out, column_lse))
    gradients = torch.empty_like(q), torch.empty_like(v), torch.empty_like(map_q), torch.empty_like(map_v)
    _extension().bidirectional_attention_backward(*inputs, scale, *map(_described, gradients))
    return gradients


def token_attention(q: Tensor, map_q: Tensor, map_v: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(q)
    _extension().token_attention(*map(_described, (q, map_q, map_v)), scale, _described(out))
    return out


def token_attention_backward(
    grad_out: Tensor, q: Tensor, map_q: Tensor, map_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(q), torch.empty_like(map_q), torch.empty_like(map_v)
    inputs = map(_described, (grad_out, q, map_q, map_v))
    _extension().token_attention_backward(*inputs, scale, *map(_described, gradients))
    return gradients


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)
    _extension().channel_moments(_described(x), _described(mean), _described(variance))
    return mean, variance


def channel_moments_backward(
    grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, other: Tensor | None
) -> Tensor:
    grad_x = torch.empty_like(x)
    arguments = map(_described, (grad_mean, grad_variance, x, mean))
    _extension().channel_moments_backward(*arguments, _described_if_any(other), _described(grad_x))
    return grad_x


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _onednn_is_faster(x, weight):
        c, h, w = x.shape[1], *x.shape[-2:]
        # torch tells the layout by the strides, which a single sample may have of what it was cut from.
        planes = x.as_strided((x.numel() // (c * h * w), c, h, w), (h * w * c, 1, w * c, c))
        result = F.conv2d(planes, weight.reshape(c, 1, 3, 3), bias, padding=1, groups=c)
        return result if x.ndim == 4 else result.unflatten(0, x.shape[:3:2]).transpose(1, 2)
    out = torch.empty_like(x)
    inputs = _described(x), _described(weight), _described_if_any(bias)
    _extension().depthwise_conv(*inputs, None, None, False, _described(out))
    return out


def _onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Of channels-last maps, with AVX-512 and 3x3 taps in planes, oneDNN reads each element once, as it lies there."""
    memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return (
        weight.shape[-2:] == (3, 3)
        and weight.shape[2:].numel() == 9
        and x.dtype in (torch.float32, torch.bfloat16)
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=memory_format)
        and x.numel() > 0
        and _extension().instruction_set() == "avx512"
    )


def depthwise_conv_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    grad_weight = torch.empty_like(weight)
    _extension().depthwise_conv_backward_weight(
        _described(grad_out), _described(x), None, None, False, _described(grad_weight)
    )
    return grad_weight


def scaled_depthwise_conv(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _extension().depthwise_conv(
        _described(x), _described(weight), None, _described(scale), _described(shift), relu, _described(out)
    )
    return out


def scaled_depthwise_conv_backward_weight(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor
) -> Tensor:
    grad_weight = torch.empty_like(weight)
    inputs = map(_described, (grad_out, x, scale, shift))
    _extension().depthwise_conv_backward_weight(*inputs, relu, _described(grad_weight))
    return grad_weight


def why_not_winograd(weight: Tensor, *maps: Tensor) -> str | None:
    """Why the dense convolution between these maps cannot run by Winograd's minimal filtering; None when it can."""
    if weight.shape[-2:] != (3, 3):
        return f"its kernel has 3 x 3 taps in planes, and the weight {weight.shape[-2]} x {weight.shape[-1]}"
    if any(m.stride(1) != 1 and m.shape[1] > 1 and m.numel() > 0 for m in maps):
        return "its kernel takes maps whose channels lie side by side, as in torch.channels_last"
    return None


def empty_channels_last(x: Tensor, channels: int) -> Tensor:
    """(B, `channels`, *spatial), uninitialised, of the other sizes and the dtype of `x`."""
    b, _, *spatial = x.shape
    return x.new_empty((b, *spatial, channels)).movedim(-1, 1)


def dense_conv(x: Tensor, weight: Tensor) -> Tensor:
    return _winograd_conv(x, None, None, False, weight)


def scaled_dense_conv(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor) -> Tensor:
    return _winograd_conv(x, scale, shift, relu, weight)


def _winograd_conv(x: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, weight: Tensor) -> Tensor:
    if (reason := why_not_winograd(weight, x)) is not None:
        raise NotImplementedError(f"dense_conv cannot run on the CPU's kernel: {reason}")
    out = empty_channels_last(x, weight.shape[0])
    inputs = _described(x), _described(weight), _described_if_any(scale), _described_if_any(shift)
    _extension().winograd_conv(*inputs, relu, _described(out))
    return out


def dense_conv_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if _winograd_pays(weight, grad_out, x):
        return _winograd_conv_backward_weight(grad_out, x, None, None, False, weight)
    grad_weight = torch.empty_like(weight)
    _extension().direct_conv_backward_weight(_described(grad_out), _described(x), _described(grad_weight))
    return grad_weight


def scaled_dense_conv_backward_weight(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor
) -> Tensor:
    if _winograd_pays(weight, grad_out, x):
        return _winograd_conv_backward_weight(grad_out, x, scale, shift, relu, weight)
    return dense_conv_backward_weight(grad_out, scale_shift(x, scale, shift, relu), weight)


def _winograd_pays(weight: Tensor, *maps: Tensor) -> bool:
    return why_not_winograd(weight, *maps) is None and min(weight.shape[:2]) >= CHANNELS_OF_WINOGRAD


def _winograd_conv_backward_weight(
    grad_out: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, weight: Tensor
) -> Tensor:
    grad_weight = torch.empty_like(weight)
    inputs = _described(grad_out), _described(x), _described_if_any(scale), _described_if_any(shift)
    _extension().winograd_conv_backward_weight(*inputs, relu, _described(grad_weight))
    return grad_weight


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    out = torch.empty_like(x)
    _extension().scale_shift(_described(x), _described(scale), _described(shift), relu, _described(out))
    return out


def scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(shift)
    arguments = map(_described, (grad_out, x, scale, shift))
    _extension().scale_shift_backward(*arguments, relu, *map(_described, gradients))
    return gradients
