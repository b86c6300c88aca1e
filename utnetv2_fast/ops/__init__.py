"""Operators for any PyTorch network: bidirectional attention and depthwise (separable) convolution, 2D and 3D."""

from utnetv2_fast.ops.bidirectional_attention import bidirectional_attention
from utnetv2_fast.ops.conv_backward_weight import conv_backward_weight
from utnetv2_fast.ops.depthwise_conv import depthwise_conv
from utnetv2_fast.ops.depthwise_separable_conv import depthwise_separable_conv
from utnetv2_fast.ops.dispatch import explain

__all__ = ["bidirectional_attention", "conv_backward_weight", "depthwise_conv", "depthwise_separable_conv", "explain"]
