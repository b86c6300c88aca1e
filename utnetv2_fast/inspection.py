"""What bidirectional attention attends to: the weights that the operator never holds, computed again beside it.

A semantic token aggregates the values of all positions with weights, the softmax of its scores over the positions. Maps
of them, their shares on each class, and how alike the aggregated tokens are (paper, Fig. 4 D and E).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast.data.dataset import Case
from utnetv2_fast.errors import InputError
from utnetv2_fast.inference.predict import Predictor, read_and_preprocess
from utnetv2_fast.models.config import LEVELS
from utnetv2_fast.models.hybrid import HybridUNet
from utnetv2_fast.nn.bidirectional_attention import BidirectionalAttention, split_heads
from utnetv2_fast.nn.channels import halves

_BLOCK = re.compile(r"(down|up)\.(\d+)\.blocks\.(\d+)\.attention")


@dataclass(frozen=True, eq=False)
class Attention:
    """What one B-MHA module computed.

    stage        "encoder-2", "decoder-3" and so on by the level of the U; in a module of other shape its own name
    block        in its stage, from 1
    updates_map  whether the network has a use for `weights`; the last block's semantic map goes nowhere
    scores       (B, H, l, *spatial), of semantic tokens and positions, scaled; float32 or better
    values       (B, H, d, *spatial), of the positions
    """

    stage: str
    block: int
    updates_map: bool
    scores: Tensor
    values: Tensor

    @property
    def weights(self) -> Tensor:
        """(B, H, l, *spatial): with which every semantic token aggregates the positions; the sum over them is one."""
        return self.scores.flatten(3).softmax(-1).view_as(self.scores)

    @property
    def shares(self) -> Tensor:
        """(B, H, l, *spatial): with which every position takes from the semantic tokens; the sum over l is one."""
        return self.scores.softmax(2)

    def aggregated(self) -> Tensor:
        """(B, H * d, l): the values as the semantic tokens aggregate them, the heads one after another."""
        tokens = self.values.flatten(3) @ self.weights.flatten(3).mT
        return tokens.flatten(1, 2)

    def down_sampled(self, map_size: Sequence[int]) -> Tensor:
        """(B, H * d, l): the same values, averaged over a grid of `map_size` instead."""
        return F.interpolate(self.values.flatten(1, 2), tuple(map_size), mode="area").flatten(2)


@contextmanager
def observed(model: nn.Module) -> Iterator[list[Attention]]:
    """A list to which every B-MHA of `model` adds what it computes within the block; the model computes the same.

    Hooks on the modules would not do: a block that fuses its norm with the projection calls `attend` alone.
    """
    seen: list[Attention] = []
    modules = {name: module for name, module in model.named_modules() if isinstance(module, BidirectionalAttention)}
    for name, module in modules.items():
        vars(module)["attend"] = partial(_attend_and_note, module, *_place(model, name), seen)
    try:
        yield seen
    finally:
        for module in modules.values():
            del vars(module)["attend"]


def _attend_and_note(
    module: BidirectionalAttention, stage: str, block: int, seen: list[Attention], qv: Tensor, semantic_map: Tensor
) -> tuple[Tensor, Tensor | None]:
    spatial = tuple(qv.shape[2:])
    with torch.no_grad():
        map_q, _ = module.map_qv(semantic_map).chunk(2, dim=1)
        with torch.autocast(qv.device.type, enabled=False):
            dtype = torch.promote_types(qv.dtype, torch.float32)
            q, v, map_q = (split_heads(t.to(dtype), module.heads) for t in (*halves(qv), map_q))
            scores = map_q @ q.mT * q.shape[-1] ** -0.5  # (B, H, l, n)
            if module.bias is not None:
                scores = scores + module.bias(spatial).mT
    seen.append(
        Attention(stage, block, module.map_out is not None, scores.unflatten(-1, spatial), v.mT.unflatten(-1, spatial))
    )
    return BidirectionalAttention.attend(module, qv, semantic_map)


def _place(model: nn.Module, name: str) -> tuple[str, int]:
    """Stage and block of the module called `name` in `model`."""
    if not (found := _BLOCK.fullmatch(name)):
        return name, 1
    side, stage, block = found[1], int(found[2]), int(found[3])
    highest = 1 if isinstance(model, HybridUNet) else 2  # UTNetV2 lists the convolutional stages apart
    return (f"encoder-{highest + stage}" if side == "down" else f"decoder-{LEVELS - 2 - stage}"), block + 1


@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor) -> list[Attention]:
    """The attention of every B-MHA in `model`, in the order in which they run on x (B, C, *spatial).

    The network pads x at the end of its axes; the maps cover all of that. Raises ValueError for a model in training
    mode, whose norms would change.
    """
    if model.training:
        raise ValueError("model must be in evaluation mode")
    with observed(model) as seen:
        model(x)
    return seen


def similarity(tokens: Tensor) -> Tensor:
    """(B, C, l) -> (B, l, l): the absolute cosine between every two tokens."""
    unit = F.normalize(tokens, dim=1)
    return (unit.mT @ unit).abs()


def mean_off_diagonal(matrix: Tensor) -> float:
    """Of (l, l), how alike different tokens are; not-a-number for a single token."""
    count = len(matrix)
    return ((matrix.sum() - matrix.trace()) / (count * count - count)).item() if count > 1 else float("nan")


def class_shares(weights: Tensor, label: Tensor, classes: int) -> Tensor:
    """(H, l, *spatial), label map (*size) -> (H, l, K): the share of every token's weight that lies on each class.

    Each position stands for the voxels of the label map that it covers.
    """
    one_hot = F.one_hot(label.long(), classes).movedim(-1, 0).to(weights.dtype)  # (K, *size)
    cover = F.interpolate(one_hot[None], tuple(weights.shape[2:]), mode="area")[0]  # (K, *spatial)
    return weights.flatten(2) @ cover.flatten(1).T


@dataclass(frozen=True, eq=False)
class InspectedBlock:
    """One B-MHA block on one window, as numpy arrays.

    weights       (H, l, *spatial): with which every semantic token aggregates the positions
    maps          (H, l, h, w): those on the slice that is shown, enlarged to it, as multiples of an even average
    shares        (H, l, K): of the weight, on each class of the prediction
    aggregated    (l, l): absolute cosine between the semantic tokens
    down_sampled  (l, l): that between as many tokens made by averaging over a grid
    """

    stage: str
    block: int
    weights: NDArray[np.float32]
    maps: NDArray[np.float32]
    shares: NDArray[np.float32]
    aggregated: NDArray[np.float32]
    down_sampled: NDArray[np.float32]

    @property
    def similarities(self) -> tuple[float, float]:
        """Mean over different tokens, of those that the attention aggregates and of those averaged over a grid."""
        aggregated, down_sampled = (
            mean_off_diagonal(torch.from_numpy(m)) for m in (self.aggregated, self.down_sampled)
        )
        return aggregated, down_sampled


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a network attends to in one window of a scan.

    image, label  (h, w): the slice that is shown, of the first channel as the network sees it, and the prediction
    spacing       of rows and columns, in mm
    axes          the canonical ones (z, y, x) of rows and columns
    position      in words, which slice it is
    classes       names of the label values 0, 1, ...
    areas         (K,): the share of each class in the window, which an even average would have
    """

    case: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    spacing: tuple[float, float]
    axes: tuple[int, int]
    position: str
    classes: tuple[str, ...]
    areas: NDArray[np.float32]
    blocks: tuple[InspectedBlock, ...]


def choose_stages(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The stages called `names`, which may be none.

    Raises InputError for one that `model` does not have, and for a model without bidirectional attention.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, BidirectionalAttention)}
    if not modules:
        network = getattr(getattr(model, "config", None), "architecture", type(model).__name__)
        raise InputError(f"The network {network} has no bidirectional attention to show; name a run of utnetv2.")
    stages = list(
        dict.fromkeys(_place(model, name)[0] for name, module in modules.items() if module.map_out is not None)
    )
    for name in names:
        if name not in stages:
            raise InputError(f"There is no level {name!r} whose tokens attend; choose among {', '.join(stages)}.")
    return list(names)


@torch.no_grad()
def inspect_case(predictor: Predictor, case: Case) -> Inspection:
    """Predict a scan and look, in float32, at one window of it: around the prediction in the slice that has most of it.

    Raises InputError for a scan that cannot be used, and a network without bidirectional attention.
    """
    model, plan = predictor.models[0], predictor.plan
    choose_stages(model, ())
    config: Any = model.config
    image, geometry, _ = read_and_preprocess(case, plan)
    prediction = np.stack([plane.argmax(0).cpu().numpy() for plane in predictor.probabilities(image)])  # (D, H, W)
    centre = _centre(prediction)
    size = (1, *predictor.patch_size) if plan.dimensions == 2 else predictor.patch_size
    places = [_place_window(n, w, c) for n, w, c in zip(prediction.shape, size, centre, strict=True)]
    window = torch.zeros(len(image), *size)
    source, inside = zip(*places, strict=True)
    window[:, inside[0], inside[1], inside[2]] = torch.from_numpy(image[:, source[0], source[1], source[2]])
    x = window if plan.dimensions == 3 else window.squeeze(1)
    with observed(model) as seen:
        logits = model(x[None].to(predictor.device))
    label = logits[0].argmax(0).cpu()  # (*window)
    padded = config.padded_size(tuple(label.shape))
    # What the network pads has no prediction of its own: it is background.
    covered = F.pad(label, [n for p, s in reversed(list(zip(padded, label.shape, strict=True))) for n in (0, p - s)])
    shown = centre[0] - source[0].start + inside[0].start  # the plane of the window
    plane = (inside[1], inside[2])
    blocks = tuple(
        _block(attention, covered, plan.num_classes, config.map_size, shown, plane)
        for attention in seen
        if attention.updates_map
    )
    names = {value: name for name, value in plan.labels.items()}
    return Inspection(
        case=case.name,
        image=window[0, shown][plane].numpy(),
        label=(label if plan.dimensions == 2 else label[shown])[plane].numpy().astype(np.uint8),
        spacing=plan.spacing[1:],
        axes=geometry.axes[1:],
        position=f"slice {centre[0] + 1} of {len(prediction)}",
        classes=tuple(names[value] for value in range(plan.num_classes)),
        areas=(torch.bincount(covered.flatten(), minlength=plan.num_classes) / covered.numel()).numpy(),
        blocks=blocks,
    )


def _centre(prediction: NDArray[np.integer]) -> tuple[int, int, int]:
    """The middle of the foreground in the plane of (D, H, W) that has most of it; of the whole where there is none."""
    counts = np.count_nonzero(prediction, axis=(1, 2))
    if not counts.any():
        d, h, w = (n // 2 for n in prediction.shape)
        return d, h, w
    plane = int(np.argmax(counts))
    found = np.argwhere(prediction[plane])
    row, column = ((found.min(axis=0) + found.max(axis=0)) // 2).tolist()
    return plane, row, column


def _place_window(size: int, window: int, centre: int) -> tuple[slice, slice]:
    """The voxels of an axis in a window around `centre`, and where they lie in it: in the middle of a larger one."""
    if size < window:
        before = (window - size) // 2
        return slice(0, size), slice(before, before + size)
    start = min(max(0, centre - window // 2), size - window)
    return slice(start, start + window), slice(0, window)


def _block(
    attention: Attention,
    label: Tensor,
    classes: int,
    map_size: Sequence[int],
    shown: int,
    plane: tuple[slice, slice],
) -> InspectedBlock:
    """`label` (*padded), `shown` and `plane`: the first index and the rows and columns of the window to show."""
    weights = attention.weights[0].cpu()  # (H, l, *spatial)
    on_slice = weights if label.ndim == 2 else weights[:, :, shown * weights.shape[2] // label.shape[0]]
    # Not aligned at the corners: a position covers a block of voxels, and its middle is theirs.
    maps = F.interpolate(on_slice, tuple(label.shape[-2:]), mode="bilinear") * weights[0, 0].numel()
    return InspectedBlock(
        stage=attention.stage,
        block=attention.block,
        weights=weights.numpy(),
        maps=maps[..., plane[0], plane[1]].numpy(),
        shares=class_shares(weights, label, classes).numpy(),
        aggregated=similarity(attention.aggregated())[0].cpu().numpy(),
        down_sampled=similarity(attention.down_sampled(map_size))[0].cpu().numpy(),
    )


def summarise(inspection: Inspection) -> dict[str, Any]:
    """The numbers of an inspection, JSON types only: similarities of each block, class and shares of each token."""
    classes = inspection.classes
    return {
        "case": inspection.case,
        "position": inspection.position,
        "area": dict(zip(classes, inspection.areas.tolist(), strict=True)),
        "blocks": [
            {
                "stage": block.stage,
                "block": block.block,
                "similarity": {
                    name: None if math.isnan(mean) else mean
                    for name, mean in zip(("attention", "down_sampled"), block.similarities, strict=True)
                },
                "tokens": [
                    {
                        "head": head + 1,
                        "token": token + 1,
                        "class": classes[int(shares.argmax())],
                        "shares": dict(zip(classes, shares.tolist(), strict=True)),
                    }
                    for head, of_head in enumerate(block.shares)
                    for token, shares in enumerate(of_head)
                ],
            }
            for block in inspection.blocks
        ],
    }
