"""Cross-validation folds by patient, kept in a file that a user may edit."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from utnetv2_fast.data.prepare import Prepared, PreparedCase
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import write_text_atomically

FOLDS = 5


class SplitRules(BaseModel):
    """How cases are divided into training and validation.

    `held_out` and `left_out` name cases by columns of `cases.csv`: those that have one of the values in every column.
    With `held_out` there is one fold, whose validation they are. Who is left out is in no fold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: int = Field(default=FOLDS, ge=2)
    scheme: Literal["even", "authors"] = Field(
        default="even", description="authors: their shuffle; what is left over after equal folds is always trained on"
    )
    held_out: dict[str, tuple[str, ...]] | None = None
    left_out: dict[str, tuple[str, ...]] | None = None


class Split(TypedDict):
    """Names of the cases of one fold."""

    train: list[str]
    val: list[str]


_EVEN = SplitRules()


def make_splits(patients: Mapping[str, str], folds: int = FOLDS, seed: int = 12345) -> list[Split]:
    """Divide cases ({case: patient}) into `folds` parts without dividing a patient; fewer parts for fewer patients.

    The folds differ by at most one patient. Raises InputError for a single patient.
    """
    names = _patients(patients)
    shuffled = np.random.default_rng(seed).permutation(names)
    held_out = [set(part.tolist()) for part in np.array_split(shuffled, min(folds, len(names)))]
    return [_split(patients, held) for held in held_out]


def make_splits_as_the_authors(patients: Mapping[str, str], folds: int = FOLDS) -> list[Split]:
    """The folds of the authors' code: patients shuffled by Python's `random` with seed 0, N // folds of them in each.

    The N mod folds patients that remain are trained on in every fold. The authors shuffle a list whose order is that of
    the file system; here it is sorted first. Fewer folds for fewer patients; InputError for a single one.
    """
    names = _patients(patients)
    folds = min(folds, len(names))
    random.Random(0).shuffle(names)
    size = len(names) // folds
    held_out = [set(names[fold * size : (fold + 1) * size]) for fold in range(folds)]
    return [_split(patients, held) for held in held_out]


def split_by_metadata(cases: Sequence[PreparedCase], held_out: Mapping[str, Sequence[str]]) -> Split:
    """One fold: the cases with one of the given values in every given column of `cases.csv` are held out.

    Raises InputError when none has, or all have.
    """
    held = {case.patient for case in cases if matches(case, held_out)}
    if not held or held == {case.patient for case in cases}:
        wanted = " and ".join(f"{column} {' or '.join(values)}" for column, values in held_out.items())
        raise InputError(
            f"{'All' if held else 'None'} of the {len(cases)} cases would be held out (by {wanted} in cases.csv); use "
            "a dataset that has both."
        )
    return _split({case.name: case.patient for case in cases}, held)


def matches(case: PreparedCase, wanted: Mapping[str, Sequence[str]] | None) -> bool:
    """Whether a case has one of the wanted values in every column; None is wanted of nobody."""
    return wanted is not None and all(case.metadata.get(column) in values for column, values in wanted.items())


def _patients(patients: Mapping[str, str]) -> list[str]:
    """Sorted; InputError when they cannot stand on two sides."""
    names = sorted(set(patients.values()))
    if len(names) < 2:
        raise InputError(
            f"{len(patients)} case(s) of one patient cannot be divided into training and validation; add patients."
        )
    return names


def _split(patients: Mapping[str, str], held: Set[str]) -> Split:
    return Split(
        train=sorted(case for case, patient in patients.items() if patient not in held),
        val=sorted(case for case, patient in patients.items() if patient in held),
    )


def _splits_by(rules: SplitRules, cases: Sequence[PreparedCase]) -> list[Split]:
    if rules.held_out is not None:
        return [split_by_metadata(cases, rules.held_out)]
    patients = {case.name: case.patient for case in cases}
    if rules.scheme == "authors":
        return make_splits_as_the_authors(patients, rules.folds)
    return make_splits(patients, rules.folds)


def splits_file(prepared: Prepared, rules: SplitRules = _EVEN) -> Path:
    """Where the folds by `rules` are kept: `splits.json`, or for other rules than the usual a file of their own."""
    own = "" if rules == _EVEN else "-" + hashlib.blake2b(rules.model_dump_json().encode(), digest_size=4).hexdigest()
    return prepared.folder / f"splits{own}.json"


def take_patients(names: Sequence[str], patients: Mapping[str, str], share: float, seed: int = 12345) -> list[str]:
    """Those of the cases `names` that belong to a share of their patients, at least one: the paper's scales of data.

    `patients` is {case: patient}. A smaller share is a part of every larger one.
    """
    people = sorted({patients[name] for name in names})
    shuffled = np.random.default_rng(seed).permutation(people)
    taken = set(shuffled[: max(1, round(share * len(people)))].tolist())
    return [name for name in names if patients[name] in taken]


def load_or_make_splits(prepared: Prepared, rules: SplitRules = _EVEN) -> list[Split]:
    """The folds in `splits_file` of the prepared folder, which is written by `rules` when there is none.

    Raises InputError when an edited file is malformed, names a case that is not there, leaves one out of every fold,
    has an empty side, or a patient on both sides of a fold.
    """
    cases = [case for case in prepared.cases if not matches(case, rules.left_out)]
    patients = {case.name: case.patient for case in cases}
    file = splits_file(prepared, rules)
    if not file.exists():
        splits = _splits_by(rules, cases)
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
