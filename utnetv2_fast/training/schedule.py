"""The learning rate over a training, as a factor of its highest value."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int, *, steps: int, warmup_steps: int, schedule: Literal["polynomial", "exponential"]
) -> float:
    """Exponential warm-up over a factor of e^10 (the authors' code), then decay to the end of training.

    "polynomial": (1 - t) ** 0.9 (nnU-Net's). "exponential": e ** (-5 t), which the paper's text names without a number.
    """
    if step < warmup_steps:
        return math.exp(10 * ((step + 1) / warmup_steps - 1))
    t = (step - warmup_steps) / max(1, steps - warmup_steps)
    return (1 - t) ** 0.9 if schedule == "polynomial" else math.exp(-5 * t)
