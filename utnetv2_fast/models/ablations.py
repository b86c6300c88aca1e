"""The variants of UTNetV2 that the paper's ablations compare, by name.

All have UTNetV2's skeleton, the channels of the preset, and as many blocks as it has at a level, so that two of them
differ in what they are called after and in nothing else.
"""

from __future__ import annotations

from utnetv2_fast.models.hybrid import Configure, bidirectional_at, variant

_LEVELS = {"2x": 1, "4x": 2, "8x": 3, "16x": 4}  # by how much their maps are down-sampled
_MAP_SIZES = (2, 3, 4, 8)  # per axis

_POSITIONS: dict[str, tuple[str, Configure]] = {
    f"bmha-at-{scale}": (f"B-MHA at {scale}", bidirectional_at(level)) for scale, level in _LEVELS.items()
}
# Title and configuration of each.
VARIANTS: dict[str, tuple[str, Configure]] = {
    "residual": ("Residual blocks", variant("residual")),
    "efficient": ("Efficient attention", variant("efficient")),
    "efficient-conv": ("Efficient attention + conv.", variant("efficient-conv")),
    "bmha": ("B-MHA without map fusion", variant("bidirectional")),
    "utnetv2-relative-position": (
        "UTNetV2 + rel. position",
        variant("bidirectional", fuse=True, relative_position=True),
    ),
    "utnetv2-identity": ("UTNetV2, identity for B-MHA", variant("identity")),
    **_POSITIONS,
    **{f"map-{n}": (f"UTNetV2, map of {n}", variant("bidirectional", fuse=True, size=n)) for n in _MAP_SIZES},
    **{
        f"efficient-conv-map-{n}": (f"Efficient attention + conv., map of {n}", variant("efficient-conv", size=n))
        for n in _MAP_SIZES
    },
}

# UTNetV2 is in every group: the others are tested against it.
ABLATIONS: dict[str, tuple[str, ...]] = {
    # Fig. 8A: each adds one part to the one before it.
    "ladder": ("residual", "efficient", "efficient-conv", "bmha", "utnetv2", "utnetv2-relative-position"),
    # Fig. 8B: where B-MHA blocks take the place of residual ones.
    "position": ("residual", *_POSITIONS, "utnetv2"),
    # Fig. 4C: semantic maps against keys and values that are down-sampled to the same size.
    "map-size": ("utnetv2", *(f"map-{n}" for n in _MAP_SIZES), *(f"efficient-conv-map-{n}" for n in _MAP_SIZES)),
    # Whether it is attention that helps, or the projections around it.
    "attention": ("utnetv2", "utnetv2-identity"),
}
