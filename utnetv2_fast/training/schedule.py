"""The learning rate over a training, as a factor of its highest value."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    schedule: Literal["polynomial", "exponential", "epochwise"],
    steps_per_epoch: int = 1,
) -> float:
    """Exponential warm-up over a factor of e^10 (the authors' code), then decay to the end of training.

    "polynomial": (1 - t) ** 0.9 (nnU-Net's). "exponential": e ** (-5 t), which the paper's text names without a number.
    "epochwise" is the authors' code to the letter: one rate for a whole epoch, and a polynomial that counts from the
    beginning of the training, not from the end of the warm-up.
    """
    if schedule == "epochwise":
        epoch, epochs, warmup_epochs = step // steps_per_epoch, steps / steps_per_epoch, warmup_steps / steps_per_epoch
        if epoch <= warmup_epochs and warmup_steps:
            return math.exp(10 * (epoch / warmup_epochs - 1))
        return (1 - epoch / epochs) ** 0.9
    if step < warmup_steps:
        return math.exp(10 * ((step + 1) / warmup_steps - 1))
    t = (step - warmup_steps) / max(1, steps - warmup_steps)
    return (1 - t) ** 0.9 if schedule == "polynomial" else math.exp(-5 * t)
