"""The scores of the folds of one dataset together, wherever each of them was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.metrics import Evaluation


def pool_folds(folds: Mapping[Path, Evaluation]) -> Evaluation:
    """All cases of all folds ({run folder: its scores}) as if they had been evaluated at once.

    Raises InputError when classes or NSD tolerances differ, and for a case that several folds held out.
    """
    (first_path, first), *others = folds.items()
    for path, fold in others:
        if rules_of(fold) != rules_of(first):
            raise InputError(
                f"{path}: its classes, NSD tolerance, protocol or leaks are not those of {first_path}; name folds of "
                "one dataset that were made alike."
            )
    holds: dict[str, Path] = {}
    for path, fold in folds.items():
        for case in fold.cases:
            if case in holds:
                raise InputError(f"{path}: held out {case}, as {holds[case]} did; name each fold once.")
            holds[case] = path
    counted = [fold.confusion for fold in folds.values() if fold.confusion]
    total = np.sum(counted, axis=0).tolist() if len(counted) == len(folds) else ()
    scores = tuple(score for fold in folds.values() for score in fold.scores)
    return replace(first, scores=scores, confusion=tuple(tuple(row) for row in total))


def rules_of(fold: Evaluation) -> Evaluation:
    """What must be alike in all evaluations that are put together."""
    return replace(fold, scores=(), confusion=())


def spread_over_folds(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, float]]:
    """Mean and sample deviation over folds of each fold's mean Dice, HD95 (mm) and NSD."""
    table = {}
    for metric in ("dice", "hd95", "nsd"):
        means = np.array([evaluation.mean(metric) for evaluation in evaluations])
        deviation = float(means.std(ddof=1)) if len(means) > 1 else float("nan")
        table[metric] = {"mean": float(means.mean()), "std": deviation}
    return table
