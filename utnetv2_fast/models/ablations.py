"""The variants of UTNetV2 that the paper's ablations compare, by name.

They have the channels of the preset. Only what has ResUNet's skeleton is, beside a small preset, made with as many
parameters as UTNetV2: so are `resunet` and `utnetv1`, with which the ladder begins and which are rivals as well. The
paper's presets have the published channels of both, so that there one network serves as the rival and the rung.
"""

from __future__ import annotations

from utnetv2_fast.models.hybrid import Configure, bidirectional_at, variant

_LEVELS = {"2x": 1, "4x": 2, "8x": 3, "16x": 4}  # by how much their maps are down-sampled
_MAP_SIZES = (2, 3, 4, 8)  # per axis

# Title and configuration of each.
POSITIONS: dict[str, tuple[str, Configure]] = {
    f"bmha-at-{scale}": (f"ResUNet + B-MHA at {scale}", bidirectional_at(level)) for scale, level in _LEVELS.items()
}
VARIANTS: dict[str, tuple[str, Configure]] = {
    # From here on the skeleton is UTNetV2's too, which convolves where ResUNet pools and projects.
    "utnetv1-conv": ("UTNetV1 + conv.", variant("efficient-conv")),
    "bmha": ("B-MHA without map fusion", variant("bidirectional")),
    "utnetv2-relative-position": (
        "UTNetV2 + rel. position",
        variant("bidirectional", fuse=True, relative_position=True),
    ),
    "utnetv2-identity": ("UTNetV2, identity for B-MHA", variant("identity")),
    **{f"map-{n}": (f"UTNetV2, map of {n}", variant("bidirectional", fuse=True, size=n)) for n in _MAP_SIZES},
    **{f"conv-map-{n}": (f"UTNetV1 + conv., map of {n}", variant("efficient-conv", size=n)) for n in _MAP_SIZES},
}

ABLATIONS: dict[str, tuple[str, ...]] = {
    # Fig. 8A: each adds one part to the one before it.
    "ladder": ("resunet", "utnetv1", "utnetv1-conv", "bmha", "utnetv2", "utnetv2-relative-position"),
    # Fig. 8B: where B-MHA blocks take the place of residual ones.
    "position": ("resunet", *POSITIONS),
    # Fig. 4C: semantic maps against keys and values that are down-sampled to the same size.
    "map-size": (*(f"map-{n}" for n in _MAP_SIZES), *(f"conv-map-{n}" for n in _MAP_SIZES)),
    # Whether it is attention that helps, or the projections around it.
    "attention": ("utnetv2", "utnetv2-identity"),
}
