"""Prediction of many scans by all ranks of a job."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from utnetv2_fast.data.dataset import Case
from utnetv2_fast.errors import InputError
from utnetv2_fast.inference.predict import Predictor, predict_files
from utnetv2_fast.progress import Track
from utnetv2_fast.ranks import Ranks
from utnetv2_fast.sharing import in_order, share


def predict_together(
    predictor: Predictor, cases: Sequence[Case], folder: Path, track: Track, ranks: Ranks
) -> tuple[list[Path], list[Path]]:
    """As `predict_files`, each case on one rank; returns on every rank when all are done.

    The first rank looks at the label maps that are there already, which are done; one that appears meanwhile is
    another rank's. Raises InputError, at the end, naming the scans that could not be predicted.
    """
    problems: dict[str, str] = {}

    def target(case: Case) -> Path:
        return folder / f"{case.name}.nii.gz"

    def predict(case: Case) -> None:
        try:
            predict_files(predictor, [case], folder)
        except InputError as problem:
            problems[case.name] = str(problem)

    kept = [target(case) for case in cases if target(case).exists()]
    if ranks.first and predictor.identity is not None:  # else nothing tells what they were made by
        predict_files(predictor, [case for case in cases if target(case) in kept], folder)
    share(
        predict,
        cases,
        name=lambda case: case.name,
        finished=lambda case: case.name in problems or target(case).exists(),
        folder=folder / ".locks",
        ranks=ranks,
        for_each=partial(in_order, track=track, description="Predicting"),
    )
    if problems:
        raise InputError(
            f"{len(problems)} of {len(cases)} scans could not be predicted, the others are in {folder}: "
            + " ".join(problems[name] for name in sorted(problems))
        )
    return [target(case) for case in cases if target(case) not in kept], kept
