"""The operators as Triton kernels (`kernels/`), with the signatures of `ops.reference`.

`dispatch` says when they can run. Importing this imports Triton.
"""

import importlib.util
from pathlib import Path

import utnetv2_fast

if importlib.util.find_spec("utnetv2_fast.kernels") is None:
    # A checkout that is not installed: kernels/ lies beside the package.
    utnetv2_fast.__path__.append(str(Path(__file__).parents[2]))

from utnetv2_fast.kernels.bidirectional_attention import (
    bidirectional_attention,
    bidirectional_attention_backward,
    token_attention,
    token_attention_backward,
)
from utnetv2_fast.kernels.channel_moments import channel_moments, channel_moments_backward
from utnetv2_fast.kernels.depthwise_conv import (
    depthwise_conv,
    depthwise_conv_backward_weight,
    scaled_depthwise_conv,
    scaled_depthwise_conv_backward_weight,
)
from utnetv2_fast.kernels.depthwise_separable_conv import (
    depthwise_separable_conv,
    scaled_depthwise_separable_conv,
)
from utnetv2_fast.kernels.scale_shift import scale_shift, scale_shift_backward

__all__ = [
    "bidirectional_attention",
    "bidirectional_attention_backward",
    "channel_moments",
    "channel_moments_backward",
    "depthwise_conv",
    "depthwise_conv_backward_weight",
    "depthwise_separable_conv",
    "scale_shift",
    "scale_shift_backward",
    "scaled_depthwise_conv",
    "scaled_depthwise_conv_backward_weight",
    "scaled_depthwise_separable_conv",
    "token_attention",
    "token_attention_backward",
]
