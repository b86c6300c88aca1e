"""The loss against its definition in float64, and at the edges: a class that is absent, a perfect prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utnetv2_fast.training.losses import (
    adaptive_dice_loss,
    expand_class_weights,
    segmentation_loss,
    soft_dice_loss,
    supervised_loss,
)


def by_definition(logits: np.ndarray, label: np.ndarray, weights: np.ndarray) -> float:
    """Weighted cross-entropy plus 1 - Dice, voxel by voxel: logits (B, K, n), label (B, n)."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = total_weight = 0.0
    for b, i in np.ndindex(*label.shape):
        entropy -= weights[label[b, i]] * np.log(p[b, label[b, i], i])
        total_weight += weights[label[b, i]]
    dice = [
        (2 * p[:, k][label == k].sum() + 1e-5) / (p[:, k].sum() + (label == k).sum() + 1e-5)
        for k in range(1, logits.shape[1])
    ]
    return float(entropy / total_weight + 1 - np.mean(dice))


def test_matches_the_definition() -> None:
    rng = np.random.default_rng(0)
    logits, label, weights = rng.normal(size=(2, 4, 30)), rng.integers(0, 3, (2, 30)), np.array([0.5, 1, 1, 1])
    spatial = torch.from_numpy(logits).reshape(2, 4, 5, 6)
    actual = segmentation_loss(spatial, torch.from_numpy(label).reshape(2, 5, 6), torch.tensor(weights).float())
    assert actual.item() == pytest.approx(by_definition(logits, label, weights), rel=1e-5)


def test_perfect_prediction_costs_nothing_even_where_a_class_is_absent() -> None:
    label = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    label[:, :2] = 1
    logits = torch.nn.functional.one_hot(label, 3).movedim(-1, 1) * 100.0
    assert segmentation_loss(logits, label, torch.ones(3)).item() < 1e-4


def test_dice_counts_the_batch_as_one() -> None:
    """A class missed in the only sample that has it costs what it costs in one large sample."""
    label = torch.tensor([[0, 0], [1, 1]])
    logits = torch.randn(2, 2, 2)
    joined = torch.cat([logits[0], logits[1]], dim=1)[None]
    torch.testing.assert_close(soft_dice_loss(logits, label), soft_dice_loss(joined, label.reshape(1, 4)))


def test_low_precision_logits_are_summed_in_float32() -> None:
    """64^3 probabilities of one half: their sum has no float16."""
    label = torch.ones(1, 64, 64, 64, dtype=torch.int64)
    loss = soft_dice_loss(torch.zeros(1, 2, 64, 64, 64, dtype=torch.float16), label)
    assert loss.item() == pytest.approx(1 - 2 * 0.5 / 1.5, rel=1e-4)


def test_auxiliary_output_takes_its_share() -> None:
    logits, auxiliary, label = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
    ones = torch.ones(3)
    main, other = (segmentation_loss(x, label, ones) for x in (logits, auxiliary))
    torch.testing.assert_close(supervised_loss((logits, auxiliary), label, ones, 0.25), 0.75 * main + 0.25 * other)
    torch.testing.assert_close(supervised_loss(logits, label, ones, 0.25), main)


def adaptive_by_definition(logits: np.ndarray, label: np.ndarray) -> float:
    """The authors' Dice, class by class: logits (B, K, n), label (B, n)."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    losses = []
    for k in range(logits.shape[1]):
        tp = p[:, k][label == k].sum()
        fp, fn = p[:, k][label != k].sum(), (1 - p[:, k])[label == k].sum()
        alpha = np.clip(fp / (fp + fn + 1e-5), 0.2, 0.8)
        losses.append(1 - tp / (tp + alpha * fp + (1 - alpha) * fn + 1e-5))
    return float(np.mean(losses))


@pytest.mark.parametrize("bias", [0.0, 3.0, -3.0])
def test_adaptive_dice_matches_its_definition(bias: float) -> None:
    """With a bias one kind of error prevails, and its weight reaches the end of its range."""
    rng = np.random.default_rng(1)
    logits, label = rng.normal(size=(2, 4, 30)), rng.integers(0, 3, (2, 30))
    logits[:, 1] += bias
    spatial = torch.from_numpy(logits).reshape(2, 4, 5, 6)
    actual = adaptive_dice_loss(spatial, torch.from_numpy(label).reshape(2, 5, 6))
    assert actual.item() == pytest.approx(adaptive_by_definition(logits, label), rel=1e-5)


def test_the_gradient_of_adaptive_dice_runs_through_its_weight() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(1, 2, 6, 6), torch.randint(0, 2, (1, 6, 6))
    gradient = torch.autograd.functional.jacobian(lambda x: adaptive_dice_loss(x, label), logits).flatten()
    for index in (0, 17, 50):
        step = torch.zeros(72).index_fill(0, torch.tensor(index), 1e-2).view_as(logits)
        difference = adaptive_dice_loss(logits + step, label) - adaptive_dice_loss(logits - step, label)
        assert gradient[index].item() == pytest.approx(difference.item() / 2e-2, rel=0.02, abs=1e-6)


def test_an_absent_class_costs_adaptive_dice_one_and_teaches_nothing() -> None:
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    label[:, :2] = 1
    logits = (torch.nn.functional.one_hot(label, 3).movedim(-1, 1) * 100.0).requires_grad_()
    loss = adaptive_dice_loss(logits, label)
    assert loss.item() == pytest.approx(1 / 3, abs=1e-4)


def test_the_dice_that_is_named_is_taken() -> None:
    logits, label, ones = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8)), torch.ones(3)
    entropy = segmentation_loss(logits, label, ones) - soft_dice_loss(logits, label)
    adaptive = entropy + adaptive_dice_loss(logits, label)
    torch.testing.assert_close(segmentation_loss(logits, label, ones, "adaptive"), adaptive)
    torch.testing.assert_close(supervised_loss((logits, logits), label, ones, 0.5, "adaptive"), adaptive)


def test_the_last_class_weight_holds_for_all_further_classes() -> None:
    assert expand_class_weights((0.5, 1), 4).tolist() == [0.5, 1, 1, 1]
    assert expand_class_weights((0.5, 1, 3), 3).tolist() == [0.5, 1, 3]
    assert expand_class_weights((0.5, 1, 3), 2).tolist() == [0.5, 1]
