"""Means, deviations and tests over trials are the textbook's; domains are told apart by what was trained on."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from utnetv2_fast.data.phantom import write_phantom
from utnetv2_fast.errors import InputError
from utnetv2_fast.study.results import (
    Domain,
    Result,
    labels_of,
    networks_of,
    over_trials,
    p_value,
    split_into_domains,
    within,
)
from utnetv2_fast.study.tables import comparison_tables, curve_tables, domain_tables, markdown, verdict, write_csv

Make = Callable[..., Result]
NAN = math.nan
CASES = [f"c{number}" for number in range(8)]


def test_a_trial_counts_by_its_mean_over_cases_and_a_network_by_its_trials(result: Make) -> None:
    trials = [
        result("utnetv2", {"a": (0.8, 0.9), "b": (0.6, 0.7)}),
        result("utnetv2", {"a": (0.5, NAN), "b": (0.7, 0.9)}, seed=1),
    ]
    rv = over_trials(trials, "dice", "RV")
    assert (rv.mean, rv.std, rv.count) == (pytest.approx(0.65), pytest.approx(np.std([0.7, 0.6], ddof=1)), 2)
    everything = over_trials(trials, "dice")
    assert everything.mean == pytest.approx(np.mean([0.75, 0.75]))  # of (0.7, 0.8) and (0.6, 0.9)
    assert math.isnan(over_trials(trials[:1], "dice").std)


def test_the_test_pairs_cases_over_folds_and_averages_seeds(result: Make) -> None:
    rng = np.random.default_rng(0)
    ours = {case: tuple(rng.uniform(0.8, 0.9, 2)) for case in CASES}
    again = {case: tuple(rng.uniform(0.8, 0.9, 2)) for case in CASES}
    theirs = {case: tuple(rng.uniform(0.7, 0.95, 2)) for case in CASES}
    results = [
        result("utnetv2", {case: ours[case] for case in CASES[:4]}),
        result("utnetv2", {case: ours[case] for case in CASES[4:]}, fold=1),
        result("utnetv2", again, seed=1),
        result("rival", theirs),
    ]
    means = [np.mean([*ours[case], *again[case]]) - np.mean(theirs[case]) for case in CASES]
    assert p_value(results, "rival") == pytest.approx(stats.wilcoxon(means).pvalue)
    assert p_value(results, "utnetv2") is None
    assert p_value([results[0], result("rival", {case: theirs[case] for case in CASES[:4]})], "rival") is None
    assert p_value([result("utnetv2", ours), result("rival", ours)], "rival") == 1.0


def test_utnetv2_is_the_last_row_and_tables_say_what_the_paper_says(result: Make) -> None:
    results = [result("utnetv2", {"a": (0.8, 0.9)}), result("gone", {"a": (0.85, NAN)}, seed=3)]
    assert networks_of(results) == ["gone", "utnetv2"]
    overview, dice, hd95 = comparison_tables(results)
    assert [row[0] for row in overview.rows] == ["gone", "UTNetV2"]
    assert dice.header == ("network", "RV", "LV", "average")
    assert dice.rows == (("gone", "85.00", "-", "85.00"), ("UTNetV2", "80.00", "90.00", "85.00"))
    assert hd95.rows[1] == ("UTNetV2", "2.00", "1.00", "1.50")
    assert "| UTNetV2 | 80.00 | 90.00 | 85.00 |" in markdown([dice])


def test_a_defeat_is_said(result: Make) -> None:
    lost = verdict([result("utnetv2", {"a": (0.8, 0.9)}), result("rival", {"a": (0.9, 0.9)})])
    assert lost == [
        "UTNetV2 does not lead by Dice: 5.00 points behind rival.",
        "UTNetV2 does not lead by HD95: 0.50 mm behind rival.",
    ]
    won = verdict([result("utnetv2", {"a": (0.9, 0.9)}), result("rival", {"a": (0.8, 0.9)})])
    assert won[0] == "UTNetV2 leads by Dice: 5.00 points before rival."
    assert verdict([result("utnetv2", {"a": (0.9, 0.9)})]) == []


def test_curves_have_a_column_per_share(result: Make) -> None:
    results = [
        result("utnetv2", {"a": (0.9, 0.9)}),
        result("utnetv2", {"a": (0.7, 0.7)}, share=0.1, train_cases=("t0",)),
        result("rival", {"a": (0.6, 0.6)}, share=0.1, train_cases=("t0",)),
    ]
    dice, _ = curve_tables(results)
    assert dice.header == ("network", "10% (1 scans)", "100% (2 scans)")
    assert dice.rows == (("rival", "60.00", "-"), ("UTNetV2", "70.00", "90.00"))
    assert verdict(results)[0].startswith("At 10% of the patients, UTNetV2 leads")


def test_domains_are_seen_where_a_case_with_it_was_trained_on(result: Make, tmp_path: Path) -> None:
    write_phantom(tmp_path / "demo", patients=4)  # vendors A to D
    held_out = {f"patient{number:03d}_ED": (0.9 - number / 10,) * 2 for number in (1, 2, 3, 4)}
    results = [result("utnetv2", held_out, data=str(tmp_path / "demo"), train_cases=("patient002_ES",))]
    domains = split_into_domains(results, "vendor")
    assert [(domain.name, domain.seen) for domain in domains] == [("B", True), ("A", False), ("C", False), ("D", False)]
    table = domain_tables(results, domains)[0]
    assert table.header[1:3] == ("B (seen, 1 scans)", "A (unseen, 1 scans)")
    assert table.rows == (("UTNetV2", "70.00", "80.00", "60.00", "50.00"),)
    with pytest.raises(InputError, match=r"says no centre of patient001_ED; it has .*vendor"):
        split_into_domains(results, "centre")


def test_within_a_domain_only_its_cases_count(result: Make) -> None:
    results = [result("utnetv2", {"a": (0.9, 0.9), "b": (0.5, 0.5)}), result("utnetv2", {"b": (0.4, 0.4)}, fold=1)]
    [narrowed] = within(results, Domain("A", True, ("a",)))
    assert narrowed.evaluation.mean("dice") == pytest.approx(0.9)


def test_other_classes_cannot_be_compared(result: Make) -> None:
    from dataclasses import replace

    first = result("utnetv2", {"a": (0.9, 0.9)})
    other = replace(first, evaluation=replace(first.evaluation, labels=("RV",)))
    with pytest.raises(InputError, match="other classes"):
        labels_of([first, other])


def test_the_csv_has_a_line_per_trial_and_class(result: Make, tmp_path: Path) -> None:
    write_csv([result("utnetv2", {"a": (0.75, NAN)}, seed=2, fold=1, share=0.5)], tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as stream:
        rv, lv = csv.DictReader(stream)
    assert (rv["network"], rv["seed"], rv["fold"], rv["share_of_patients"]) == ("utnetv2", "2", "1", "0.5")
    assert (rv["class"], rv["dice"], rv["hd95_mm"], rv["steps"]) == ("RV", "0.75", "2.5", "480")
    assert (lv["class"], lv["dice"]) == ("LV", "")
