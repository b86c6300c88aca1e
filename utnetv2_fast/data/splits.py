"""Cross-validation folds by patient, kept in a file that a user may edit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from utnetv2_fast.data.prepare import Prepared
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import write_text_atomically

FOLDS = 5


class Split(TypedDict):
    """Names of the cases of one fold."""

    train: list[str]
    val: list[str]


def make_splits(patients: Mapping[str, str], folds: int = FOLDS, seed: int = 12345) -> list[Split]:
    """Divide cases ({case: patient}) into `folds` parts without dividing a patient; fewer parts for fewer patients.

    The folds differ by at most one patient. Raises InputError for a single patient.
    """
    names = sorted(set(patients.values()))
    if len(names) < 2:
        raise InputError(
            f"{len(patients)} case(s) of one patient cannot be divided into training and validation; add patients."
        )
    shuffled = np.random.default_rng(seed).permutation(names)
    held_out = [set(part.tolist()) for part in np.array_split(shuffled, min(folds, len(names)))]
    return [
        Split(
            train=sorted(case for case, patient in patients.items() if patient not in held),
            val=sorted(case for case, patient in patients.items() if patient in held),
        )
        for held in held_out
    ]


def load_or_make_splits(prepared: Prepared) -> list[Split]:
    """The folds in `splits.json` of the prepared folder, which is written when there is none.

    Raises InputError when an edited file is malformed, names a case that is not there, leaves one out of every fold,
    has an empty side, or a patient on both sides of a fold.
    """
    patients = {case.name: case.patient for case in prepared.cases}
    file = prepared.folder / "splits.json"
    if not file.exists():
        splits = make_splits(patients)
        write_text_atomically(file, json.dumps(splits, indent=2))
        return splits
    try:
        splits = TypeAdapter(list[Split]).validate_json(file.read_bytes())
    except ValidationError:
        raise InputError(
            f'{file}: not a list of {{"train": [...], "val": [...]}}; correct it, or delete it to have it made anew.'
        ) from None
    for fold, split in enumerate(splits):
        _check_split(file, fold, split, patients)
    named = {case for split in splits for case in (*split["train"], *split["val"])}
    if not splits or (left_out := sorted(patients.keys() - named)):
        what = f"case {left_out[0]}" if splits else "every case"
        raise InputError(f"{file}: {what} is in no fold; add it, or delete the file to have it made anew.")
    return splits


def _check_split(file: Path, fold: int, split: Split, patients: Mapping[str, str]) -> None:
    sides: tuple[Literal["train"], Literal["val"]] = ("train", "val")
    for side in sides:
        if not split[side]:
            raise InputError(f"{file}: fold {fold} has no case under {side}; name at least one.")
        if unknown := sorted(set(split[side]) - patients.keys()):
            raise InputError(f"{file}: fold {fold} names {unknown[0]}, which is not prepared; remove it.")
    train, val = ({patients[case] for case in split[side]} for side in sides)
    if shared := sorted(train & val):
        raise InputError(
            f"{file}: fold {fold} has patient {shared[0]} under train and val; keep a patient on one side."
        )
