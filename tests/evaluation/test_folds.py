"""The folds' scores together are those of one evaluation of all their cases."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.folds import pool_folds, spread_over_folds
from utnetv2_fast.evaluation.metrics import Evaluation, Score


def fold(*dice: tuple[str, float], tolerance: float = 1.0, label: str = "LV") -> Evaluation:
    scores = tuple(Score(case, label, value, 1.0, 1.0, 5, 5) for case, value in dice)
    return Evaluation((label,), tolerance, scores, ((len(dice), 1), (2, 3)))


FIRST, SECOND = fold(("a", 0.9), ("b", 0.7), ("c", 0.8)), fold(("d", 0.4))


def test_every_case_counts_alike_when_pooled_and_every_fold_in_the_spread() -> None:
    pooled = pool_folds({Path("0"): FIRST, Path("1"): SECOND})
    assert pooled.cases == ("a", "b", "c", "d")
    assert pooled.mean("dice") == pytest.approx(0.7)
    assert pooled.confusion == ((4, 2), (4, 6))
    spread = spread_over_folds([FIRST, SECOND])["dice"]
    assert spread == {"mean": pytest.approx(0.6), "std": pytest.approx(math.sqrt(0.08))}


def test_one_fold_is_itself() -> None:
    assert pool_folds({Path("0"): FIRST}) == FIRST
    assert math.isnan(spread_over_folds([FIRST])["dice"]["std"])


def test_confusion_is_left_out_where_a_fold_did_not_count_it() -> None:
    uncounted = Evaluation(("LV",), 1.0, SECOND.scores)
    assert pool_folds({Path("0"): FIRST, Path("1"): uncounted}).confusion == ()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (fold(("a", 0.5)), "^1: held out a, as 0 did"),
        (fold(("d", 0.5), label="RV"), "^1: its classes"),
        (fold(("d", 0.5), tolerance=2.0), "NSD tolerance"),
    ],
)
def test_what_is_not_another_fold_of_the_dataset_is_refused(other: Evaluation, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pool_folds({Path("0"): FIRST, Path("1"): other})
