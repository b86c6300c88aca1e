"""Depthwise-separable convolution: a depthwise convolution, then a pointwise one, nothing between them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from utnetv2_fast.ops.arguments import autocast_dtype, check_alike, lowered
from utnetv2_fast.ops.depthwise_conv import depthwise_conv
from utnetv2_fast.ops.dispatch import Impl


def depthwise_separable_conv(
    x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Convolve every channel with its own kernel, then mix the channels at every position.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W), any strides.
        depthwise_weight: (C, 1, *k), every k odd; stride 1, zero 'same' padding.
        pointwise_weight: (C_out, C, 1, ...), as many ones as `x` has spatial axes.
        impl: backend: "auto" takes the fastest that can run these inputs, a named one runs or raises.

    Returns:
        (B, C_out, *spatial).

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown `impl`.
        NotImplementedError: the backend named by `impl` cannot run these inputs.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, depthwise_weight, pointwise_weight = (lowered(t, dtype) for t in (x, depthwise_weight, pointwise_weight))
    if pointwise_weight.ndim != x.ndim or pointwise_weight.shape[1:] != (x.shape[1], *[1] * (x.ndim - 2)):
        raise ValueError(
            f"pointwise_weight must be (C_out, C{', 1' * (x.ndim - 2)}) beside x of shape {tuple(x.shape)},"
            f" not of shape {tuple(pointwise_weight.shape)}"
        )
    check_alike("pointwise_weight", pointwise_weight, "x", x)
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(depthwise_conv(x, depthwise_weight, impl=impl), pointwise_weight)
