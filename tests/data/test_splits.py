"""Folds never divide a patient, and a user's edits are checked."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utnetv2_fast.data.fingerprint import IntensityStatistics
from utnetv2_fast.data.plan import Plan
from utnetv2_fast.data.prepare import Prepared, PreparedCase
from utnetv2_fast.data.splits import SplitRules, load_or_make_splits, make_splits, make_splits_as_the_authors
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


def test_the_authors_folds() -> None:
    """Equal parts of Python's shuffle with seed 0; who remains is trained on in every fold."""
    patients = {f"p{index:02d}-{phase}": f"p{index:02d}" for index in range(13) for phase in ("ED", "ES")}
    splits = make_splits_as_the_authors(patients)
    shuffled = [f"p{index:02d}" for index in range(13)]
    random.Random(0).shuffle(shuffled)
    held_out = [{patients[case] for case in split["val"]} for split in splits]
    assert held_out == [set(shuffled[2 * fold : 2 * fold + 2]) for fold in range(5)]
    for split in splits:
        assert sorted(split["train"] + split["val"]) == sorted(patients)
        assert {patients[case] for case in split["train"]} >= set(shuffled[10:])
    assert len(make_splits_as_the_authors({"a": "1", "b": "2", "c": "3"})) == 3
    with pytest.raises(InputError, match="one patient"):
        make_splits_as_the_authors({"a": "1", "b": "1"})


@pytest.fixture
def domains(prepared: Prepared) -> Prepared:
    """c0 ... c5 of p0, p1, p2; the last patient in the test set, the second of another challenge."""
    metadata = [{"set": name, "subset": subset} for name, subset in (("A", "train"), ("B", "test"), ("A", "test"))]
    cases = tuple(replace(case, metadata=metadata[n // 2]) for n, case in enumerate(prepared.cases))
    return replace(prepared, cases=cases)


def test_held_out_by_metadata(domains: Prepared) -> None:
    rules = SplitRules(held_out={"set": ("A",), "subset": ("test", "validation")})
    [split] = load_or_make_splits(domains, rules)
    assert split == {"train": ["c0", "c1", "c2", "c3"], "val": ["c4", "c5"]}
    assert load_or_make_splits(domains, rules) == [split]


def test_left_out_by_metadata(domains: Prepared) -> None:
    rules = SplitRules(left_out={"set": ("B",)})
    splits = load_or_make_splits(domains, rules)
    assert sorted(case for split in splits for case in split["val"]) == ["c0", "c1", "c4", "c5"]
    assert load_or_make_splits(domains, rules) == splits
    everybody = load_or_make_splits(domains)  # other rules, another file
    assert sorted(case for split in everybody for case in split["val"]) == [f"c{number}" for number in range(6)]


@pytest.mark.parametrize(("held_out", "words"), [({"set": ("C",)}, "None of the 6"), ({"set": ("A", "B")}, "All of")])
def test_nobody_or_everybody_held_out(domains: Prepared, held_out: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_or_make_splits(domains, SplitRules(held_out=held_out))
    assert not list(domains.folder.glob("splits*.json"))


def test_the_rules_of_a_split_decide_its_folds(prepared: Prepared) -> None:
    assert len(load_or_make_splits(prepared, SplitRules(folds=2))) == 2
    patients = {case.name: case.patient for case in prepared.cases}
    authors = load_or_make_splits(prepared, SplitRules(scheme="authors", folds=2))
    assert authors == make_splits_as_the_authors(patients, 2) != make_splits(patients, 2)
