"""The learning rate rises to its highest value at the end of the warm-up and falls from there to the end."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utnetv2_fast.training.schedule import learning_rate_factor

schedules = st.sampled_from(["polynomial", "exponential"])


@given(steps=st.integers(1, 400), warmup=st.integers(0, 400), schedule=schedules)
def test_rises_then_falls(steps: int, warmup: int, schedule: Literal["polynomial", "exponential"]) -> None:
    factors = [learning_rate_factor(step, steps=steps, warmup_steps=warmup, schedule=schedule) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup < steps:
        assert falling[0] == 1


def test_the_authors_warm_up() -> None:
    """lr0 * e ** (10 (e / 5 - 1)) at the epochs 1 to 5 of a warm-up of five (2.718 in their code)."""
    factors = [learning_rate_factor(e - 1, steps=200, warmup_steps=5, schedule="polynomial") for e in range(1, 6)]
    assert factors == pytest.approx([3.4e-4, 2.48e-3, 1.83e-2, 0.135, 1], rel=0.02)


def test_nothing_is_left_after_the_last_step_of_the_polynomial() -> None:
    assert learning_rate_factor(100, steps=100, warmup_steps=10, schedule="polynomial") == 0
