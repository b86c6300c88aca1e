"""The loss: class-weighted cross-entropy plus Dice, on the logits and, with deep supervision, on the auxiliary ones.

In a data-parallel training each rank has its part of the batch, and all of them get the loss of the whole batch.
"""

from __future__ import annotations

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


def weighted_cross_entropy(logits: Tensor, label: Tensor, class_weights: Tensor) -> Tensor:
    """Mean over voxels, each with the weight in `class_weights` (K,) of its class; shapes as for `soft_dice_loss`."""
    mean = F.cross_entropy(logits.float(), label, weight=class_weights)
    weight = class_weights[label].sum()
    return sum_over_ranks(mean * weight) / sum_over_ranks(weight)


def segmentation_loss(logits: Tensor, label: Tensor, class_weights: Tensor) -> Tensor:
    """Cross-entropy weighted by `class_weights` (K,) plus Dice loss; shapes as for `soft_dice_loss`."""
    return weighted_cross_entropy(logits, label, class_weights) + soft_dice_loss(logits, label)


def supervised_loss(
    outputs: Tensor | tuple[Tensor, Tensor], label: Tensor, class_weights: Tensor, auxiliary_weight: float
) -> Tensor:
    """The loss of what the network returns in training mode: logits, or logits and auxiliary logits."""
    if isinstance(outputs, Tensor):
        return segmentation_loss(outputs, label, class_weights)
    logits, auxiliary = outputs
    main = segmentation_loss(logits, label, class_weights)
    return (1 - auxiliary_weight) * main + auxiliary_weight * segmentation_loss(auxiliary, label, class_weights)
