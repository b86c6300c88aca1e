"""The loss: class-weighted cross-entropy plus Dice, on the logits and, with deep supervision, on the auxiliary ones.

In a data-parallel training each rank has its part of the batch, and all of them get the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from utnetv2_fast.nn.across_ranks import sum_over_ranks


def soft_dice_loss(logits: Tensor, label: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - soft Dice, averaged over the foreground classes, each taken over the whole batch (nnU-Net's batch Dice).

    logits (B, K, *spatial), label (B, *spatial) int64 -> scalar float32. A class that is neither in the batch nor
    predicted has Dice 1.
    """
    probability = logits.float().softmax(dim=1)
    one_hot = torch.zeros_like(probability).scatter_(1, label.unsqueeze(1), 1)
    axes = (0, *range(2, logits.ndim))
    overlap = sum_over_ranks((probability * one_hot).sum(axes)[1:])  # (K - 1,)
    total = sum_over_ranks(probability.sum(axes)[1:] + one_hot.sum(axes)[1:])
    return 1 - ((2 * overlap + smooth) / (total + smooth)).mean()


def adaptive_dice_loss(logits: Tensor, label: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - TP / (TP + a FP + (1 - a) FN), averaged over all classes, each taken over the whole batch (authors' code).

    logits (B, K, *spatial), label (B, *spatial) int64 -> scalar float32. The kind of error that prevails weighs more,
    a = FP / (FP + FN) held within [0.2, 0.8], and the gradient runs through a too. Background counts as a class. One
    that is not in the batch has the loss 1 and no gradient.
    """
    probability = logits.float().softmax(dim=1)
    one_hot = torch.zeros_like(probability).scatter_(1, label.unsqueeze(1), 1)
    axes = (0, *range(2, logits.ndim))
    hit = sum_over_ranks((probability * one_hot).sum(axes))  # (K,)
    made_up = sum_over_ranks(probability.sum(axes)) - hit
    missed = sum_over_ranks(one_hot.sum(axes)) - hit
    share = (made_up / (made_up + missed + smooth)).clamp(0.2, 0.8)
    return 1 - (hit / (hit + share * made_up + (1 - share) * missed + smooth)).mean()


def weighted_cross_entropy(logits: Tensor, label: Tensor, class_weights: Tensor) -> Tensor:
    """Mean over voxels, each with the weight in `class_weights` (K,) of its class; shapes as for `soft_dice_loss`."""
    mean = F.cross_entropy(logits.float(), label, weight=class_weights)
    weight = class_weights[label].sum()
    return sum_over_ranks(mean * weight) / sum_over_ranks(weight)


def expand_class_weights(weights: Sequence[float], classes: int) -> Tensor:
    """(K,) float32: `weights`, the last one repeated for further classes; surplus ones are left out."""
    return torch.tensor([weights[min(value, len(weights) - 1)] for value in range(classes)])


def segmentation_loss(
    logits: Tensor, label: Tensor, class_weights: Tensor, dice: Literal["soft", "adaptive"] = "soft"
) -> Tensor:
    """Cross-entropy weighted by `class_weights` (K,) plus Dice loss; shapes as for `soft_dice_loss`."""
    overlap = soft_dice_loss if dice == "soft" else adaptive_dice_loss
    return weighted_cross_entropy(logits, label, class_weights) + overlap(logits, label)


def supervised_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    label: Tensor,
    class_weights: Tensor,
    auxiliary_weight: float,
    dice: Literal["soft", "adaptive"] = "soft",
) -> Tensor:
    """The loss of what the network returns in training mode: logits, or logits and auxiliary logits."""
    if isinstance(outputs, Tensor):
        return segmentation_loss(outputs, label, class_weights, dice)
    logits, auxiliary = outputs
    main = segmentation_loss(logits, label, class_weights, dice)
    return (1 - auxiliary_weight) * main + auxiliary_weight * segmentation_loss(auxiliary, label, class_weights, dice)
