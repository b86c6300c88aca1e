"""The learning rate rises to its highest value at the end of the warm-up and falls from there to the end."""

from __future__ import annotations

import math
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


def test_the_authors_schedule_has_one_rate_per_epoch() -> None:
    """The factors of their code (training/utils.py) for 200 epochs with a warm-up of five."""

    def factor(step: int) -> float:
        return learning_rate_factor(step, steps=2000, warmup_steps=50, schedule="epochwise", steps_per_epoch=10)

    factors = [factor(step) for step in range(2000)]
    epochs = factors[::10]
    assert all(factors[10 * epoch : 10 * epoch + 10] == [rate] * 10 for epoch, rate in enumerate(epochs))
    expected = [math.exp(10 * (epoch / 5 - 1)) if epoch <= 5 else (1 - epoch / 200) ** 0.9 for epoch in range(200)]
    assert epochs == pytest.approx(expected)
    assert epochs[:2] == pytest.approx([4.5e-5, 3.35e-4], rel=0.01)


def test_without_warm_up_the_authors_schedule_begins_at_the_top() -> None:
    first = learning_rate_factor(0, steps=20, warmup_steps=0, schedule="epochwise", steps_per_epoch=10)
    assert first == 1
