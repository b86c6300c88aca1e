"""Whether torch multiplies float32 in TF32 on a GPU, which our kernels then do as well.

torch has two ways to say so, and reading the old one (`allow_tf32`) raises where the new one (`fp32_precision`, since
torch 2.9) was used. A leaf, like `kernels/` below it: imports torch alone.
"""

from __future__ import annotations

import torch


def products_in_tf32() -> bool:
    """Of matrices: not unless the user asks for it."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def convolutions_in_tf32() -> bool:
    """By cuDNN: unless the user asks for float32."""
    convolution = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if convolution is None else convolution.fp32_precision == "tf32"


# What `torch.compiler.assume_constant_result` does, without importing Dynamo for it.
products_in_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
convolutions_in_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
