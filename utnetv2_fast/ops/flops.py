"""Operation counts of the operators for `torch.utils.flop_counter.FlopCounterMode`; importing this registers them.

Apart from the operators because that module of torch imports triton. Counted as torch does: products only, an addition
and a multiplication each, nothing for softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.utnetv2_fast


def _products(count: int, q_shape: Sequence[int], map_shape: Sequence[int]) -> int:
    """`count` products of n x d and l x d matrices (or n x l and l x d, ...) for every sample and head."""
    return 2 * count * math.prod(q_shape) * map_shape[2]


@register_flop_formula(_ops.bidirectional_attention)
def _bidirectional_attention(
    q_shape: Sequence[int], v_shape: Sequence[int], map_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return _products(3, q_shape, map_shape)


@register_flop_formula(_ops.bidirectional_attention_backward)
def _bidirectional_attention_backward(
    grad_shape: Sequence[int], grad_map_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return _products(7, grad_shape, grad_map_shape)


@register_flop_formula(_ops.token_attention)
def _token_attention(q_shape: Sequence[int], map_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return _products(2, q_shape, map_shape)


@register_flop_formula(_ops.token_attention_backward)
def _token_attention_backward(
    grad_shape: Sequence[int], q_shape: Sequence[int], map_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return _products(5, q_shape, map_shape)


@register_flop_formula(_ops.depthwise_conv)
def _depthwise_conv(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * math.prod(weight_shape[2:])


@register_flop_formula(_ops.depthwise_conv_backward_weight)
def _depthwise_conv_backward_weight(grad_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    return _depthwise_conv(*rest)


@register_flop_formula(_ops.dense_conv)
def _dense_conv(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0] * math.prod(weight_shape[2:])


@register_flop_formula(_ops.dense_conv_backward_weight)
def _dense_conv_backward_weight(grad_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    return _dense_conv(*rest)


@register_flop_formula(_ops.scaled_dense_conv)
def _scaled_dense_conv(
    x_shape: Sequence[int], scale_shape: Sequence[int], shift_shape: Sequence[int], relu: bool, *rest: Any, **__: Any
) -> int:
    return _dense_conv(x_shape, *rest)


@register_flop_formula(_ops.scaled_dense_conv_backward_weight)
def _scaled_dense_conv_backward_weight(grad_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    return _scaled_dense_conv(*rest)


@register_flop_formula(_ops.scaled_depthwise_conv)
def _scaled_depthwise_conv(
    x_shape: Sequence[int], scale_shape: Sequence[int], shift_shape: Sequence[int], relu: bool, *rest: Any, **__: Any
) -> int:
    return _depthwise_conv(x_shape, *rest)


@register_flop_formula(_ops.scaled_depthwise_conv_backward_weight)
def _scaled_depthwise_conv_backward_weight(grad_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    return _scaled_depthwise_conv(*rest)


@register_flop_formula(_ops.depthwise_separable_conv)
def _depthwise_separable_conv(
    x_shape: Sequence[int], depthwise_shape: Sequence[int], pointwise_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * math.prod(x_shape) * (math.prod(depthwise_shape[2:]) + pointwise_shape[0])


@register_flop_formula(_ops.scaled_depthwise_separable_conv)
def _scaled_depthwise_separable_conv(
    x_shape: Sequence[int], scale_shape: Sequence[int], shift_shape: Sequence[int], relu: bool, *rest: Any, **__: Any
) -> int:
    return _depthwise_separable_conv(x_shape, *rest)
