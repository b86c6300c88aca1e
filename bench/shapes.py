"""The shapes that UTNetV2's operators meet in the networks of the paper, per sample, and its trainings' batches."""

from __future__ import annotations

from typing import NamedTuple


class Attention(NamedTuple):
    """Bidirectional attention at one level: heads, tokens, semantic tokens, channels of a head."""

    H: int
    n: int
    l: int
    d: int


class Depthwise(NamedTuple):
    """A depthwise(-separable) convolution: channels, output channels of the pointwise one, map, kernel."""

    C: int
    C_out: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]


BATCHES = {"acdc-2d": 32, "acdc-3d": 3, "acdc-3d-medformer": 3, "bcv-3d": 3, "lits-3d": 2}

ATTENTION: dict[str, list[Attention]] = {
    "acdc-2d": [Attention(4, 4096, 9, 32), Attention(8, 1024, 9, 32), Attention(16, 256, 9, 32)],
    "acdc-3d": [Attention(4, 36864, 27, 32), Attention(4, 4608, 27, 64), Attention(4, 576, 27, 80)],
    "acdc-3d-medformer": [Attention(4, 36864, 72, 32), Attention(4, 4608, 72, 64), Attention(4, 576, 72, 80)],
    "bcv-3d": [Attention(4, 32768, 64, 32), Attention(8, 4096, 64, 32), Attention(10, 512, 64, 32)],
    "lits-3d": [Attention(1, 32768, 64, 128), Attention(1, 4096, 64, 256), Attention(1, 512, 64, 320)],
}

# In front of the attention of each level the hidden convolution of MBConv, then what projects q and v.
DEPTHWISE: dict[str, list[Depthwise]] = {
    "acdc-2d": [
        Depthwise(256, 256, (64, 64), (3, 3)),
        Depthwise(512, 512, (32, 32), (3, 3)),
        Depthwise(1024, 1024, (16, 16), (3, 3)),
        Depthwise(128, 256, (64, 64), (3, 3)),
    ],
    "acdc-3d": [
        Depthwise(512, 256, (16, 48, 48), (3, 3, 3)),
        Depthwise(1024, 512, (8, 24, 24), (3, 3, 3)),
        Depthwise(1280, 640, (4, 12, 12), (3, 3, 3)),
        Depthwise(128, 64, (16, 96, 96), (1, 3, 3)),
        Depthwise(128, 256, (16, 48, 48), (3, 3, 3)),
    ],
    "bcv-3d": [Depthwise(512, 256, (32, 32, 32), (3, 3, 3)), Depthwise(128, 256, (32, 32, 32), (3, 3, 3))],
    "lits-3d": [Depthwise(512, 256, (32, 32, 32), (3, 3, 3))],
}
