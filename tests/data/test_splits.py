"""Folds never divide a patient, and a user's edits are checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utnetv2_fast.data.fingerprint import IntensityStatistics
from utnetv2_fast.data.plan import Plan
from utnetv2_fast.data.prepare import Prepared, PreparedCase
from utnetv2_fast.data.splits import load_or_make_splits, make_splits
from utnetv2_fast.errors import InputError

STATISTICS = IntensityStatistics(mean=0, std=1, median=0, minimum=0, maximum=1, percentile_00_5=0, percentile_99_5=1)


@given(owners=st.lists(st.integers(0, 12), min_size=2, max_size=60), folds=st.integers(2, 7), seed=st.integers(0, 9))
def test_folds_divide_the_cases_but_no_patient(owners: list[int], folds: int, seed: int) -> None:
    patients = {f"case{index}": f"patient{owner}" for index, owner in enumerate(owners)}
    count = len(set(owners))
    if count < 2:
        with pytest.raises(InputError, match="one patient"):
            make_splits(patients, folds, seed)
        return
    splits = make_splits(patients, folds, seed)
    assert len(splits) == min(folds, count)
    assert sorted(case for split in splits for case in split["val"]) == sorted(patients)
    sizes = [len({patients[case] for case in split["val"]}) for split in splits]
    assert max(sizes) - min(sizes) <= 1
    for split in splits:
        assert sorted(split["train"] + split["val"]) == sorted(patients)
        assert not {patients[case] for case in split["train"]} & {patients[case] for case in split["val"]}


def test_folds_depend_on_the_seed_and_on_nothing_else() -> None:
    patients = {f"c{index}": f"p{index // 2}" for index in range(40)}
    backwards = dict(reversed(patients.items()))
    assert make_splits(patients) == make_splits(backwards)
    assert make_splits(patients, seed=1) != make_splits(patients, seed=2)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    plan = Plan(
        dataset="x",
        dimensions=3,
        labels={"background": 0, "a": 1},
        channels=("MRI",),
        axes=(0, 1, 2),
        spacing=(1, 1, 1),
        median_shape=(9, 9, 9),
        normalisation=("zscore",),
        intensities=(STATISTICS,),
    )
    cases = tuple(PreparedCase(f"c{n}", f"p{n // 2}", tmp_path, tmp_path, tmp_path) for n in range(6))
    return Prepared(tmp_path, plan, cases)


def test_made_once_then_read(prepared: Prepared) -> None:
    splits = load_or_make_splits(prepared)
    assert len(splits) == 3
    assert json.loads((prepared.folder / "splits.json").read_text()) == splits
    edited = [{"train": ["c0", "c1", "c2", "c3"], "val": ["c4", "c5"]}]
    (prepared.folder / "splits.json").write_text(json.dumps(edited))
    assert load_or_make_splits(prepared) == edited


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a list"),
        ('{"train": [], "val": []}', "not a list"),
        ('[{"train": ["c0"]}]', "not a list"),
        ("[]", "every case is in no fold"),
        ('[{"train": [], "val": ["c0", "c1", "c2", "c3", "c4", "c5"]}]', "fold 0 has no case under train"),
        ('[{"train": ["c0", "c1", "c2", "c3", "c4", "c5"], "val": []}]', "fold 0 has no case under val"),
        ('[{"train": ["c0", "c1", "c9"], "val": ["c2", "c3", "c4", "c5"]}]', "names c9"),
        ('[{"train": ["c0", "c2", "c3"], "val": ["c1", "c4", "c5"]}]', "patient p0 under train and val"),
        ('[{"train": ["c0", "c1"], "val": ["c2", "c3"]}]', "c4 is in no fold"),
    ],
)
def test_edits_that_cannot_be(prepared: Prepared, content: str, words: str) -> None:
    (prepared.folder / "splits.json").write_text(content)
    with pytest.raises(InputError, match=rf"splits\.json: .*{words}"):
        load_or_make_splits(prepared)
