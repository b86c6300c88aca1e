"""Operators for any PyTorch network, 2D and 3D: bidirectional attention, convolutions, normalisation."""

from utnetv2_fast.ops.bidirectional_attention import bidirectional_attention
from utnetv2_fast.ops.channel_moments import channel_moments, through_channel_moments
from utnetv2_fast.ops.dense_conv import dense_conv, dense_conv_backward_weight
from utnetv2_fast.ops.depthwise_conv import depthwise_conv
from utnetv2_fast.ops.depthwise_separable_conv import depthwise_separable_conv
from utnetv2_fast.ops.dispatch import explain
from utnetv2_fast.ops.scale_shift import scale_shift

__all__ = [
    "bidirectional_attention",
    "channel_moments",
    "dense_conv",
    "dense_conv_backward_weight",
    "depthwise_conv",
    "depthwise_separable_conv",
    "explain",
    "scale_shift",
    "through_channel_moments",
]
