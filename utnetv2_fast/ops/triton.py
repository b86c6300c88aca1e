"""The operators as Triton kernels (`kernels/`), with the signatures of `ops.reference`.

`dispatch` says when they can run. Importing this imports Triton.
"""

from utnetv2_fast.kernels.bidirectional_attention import (
    bidirectional_attention,
    bidirectional_attention_backward,
    token_attention,
    token_attention_backward,
)

__all__ = [
    "bidirectional_attention",
    "bidirectional_attention_backward",
    "token_attention",
    "token_attention_backward",
]
