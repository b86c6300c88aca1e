"""Means, deviations and tests over trials are the textbook's; domains are told apart by what was trained on."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from utnetv2_fast.data.phantom import write_phantom
from utnetv2_fast.errors import InputError
from utnetv2_fast.study.results import (
    Domain,
    Result,
    check_alike,
    in_common,
    networks_of,
    over_trials,
    p_value,
    split_into_domains,
    title_of,
    within,
)
from utnetv2_fast.study.tables import (
    comparison_tables,
    curve_tables,
    domain_tables,
    markdown,
    numbers,
    verdict,
    write_csv,
    write_scores,
)

Make = Callable[..., Result]
NAN = math.nan
CASES = [f"c{number}" for number in range(8)]
EACH_ITS_OWN = {case: case for case in (*CASES, "a", "b")}


def test_a_training_counts_by_its_mean_over_cases_and_a_network_by_its_seeds(result: Make) -> None:
    trials = [
        result("utnetv2", {"a": (0.8, 0.9), "b": (0.6, 0.7)}),
        result("utnetv2", {"a": (0.5, NAN), "b": (0.7, 0.9)}, seed=1),
    ]
    rv = over_trials(trials, "dice", "RV")
    assert (rv.mean, rv.std) == (pytest.approx(0.65), pytest.approx(np.std([0.7, 0.6], ddof=1)))
    everything = over_trials(trials, "dice")
    assert everything.mean == pytest.approx(np.mean([0.75, 0.75]))  # of (0.7, 0.8) and (0.6, 0.9)
    assert math.isnan(over_trials(trials[:1], "dice").std)


def test_of_several_folds_each_counts_by_the_mean_of_its_seeds(result: Make) -> None:
    values = {(0, 0): 0.9, (1, 0): 0.7, (0, 1): 0.5}  # of seed and fold
    trials = [
        result("utnetv2", {f"c{fold}": (dice, dice)}, seed=seed, fold=fold) for (seed, fold), dice in values.items()
    ]
    spread = over_trials(trials, "dice")
    assert (spread.mean, spread.std) == (pytest.approx(0.65), pytest.approx(np.std([0.8, 0.5], ddof=1)))


def test_only_seeds_and_folds_that_all_have_are_compared(result: Make) -> None:
    results = [
        result("utnetv2", {"a": (0.9, 0.9)}),
        result("utnetv2", {"a": (0.1, 0.1)}, seed=1),
        result("rival", {"a": (0.8, 0.8)}),
    ]
    assert in_common(results) == [results[0], results[2]]
    left_out, by_dice, _ = verdict(results, EACH_ITS_OWN)
    assert "1 trainings are left out" in left_out
    assert by_dice == "By Dice, UTNetV2 leads: 10.00 points before rival."


def test_the_test_pairs_patients_over_folds_and_averages_scans_and_seeds(result: Make) -> None:
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
    assert p_value(results, "rival", EACH_ITS_OWN) == pytest.approx(stats.wilcoxon(means).pvalue)
    by_patient = {case: "p0" if case in CASES[:2] else case for case in CASES}
    paired = [(means[0] + means[1]) / 2, *means[2:]]
    assert p_value(results, "rival", by_patient) == pytest.approx(stats.wilcoxon(paired).pvalue)
    assert p_value(results, "utnetv2", EACH_ITS_OWN) is None
    few = {case: "p" if case in CASES[:4] else case for case in CASES}  # five patients
    assert p_value(results, "rival", few) is None
    assert p_value([result("utnetv2", ours), result("rival", ours)], "rival", EACH_ITS_OWN) == 1.0


def test_utnetv2_is_the_last_row_and_tables_say_what_the_paper_says(result: Make) -> None:
    results = [result("utnetv2", {"a": (0.8, 0.9)}), result("gone", {"a": (0.85, NAN)}, seed=3)]
    assert networks_of(results) == ["gone", "utnetv2"]
    overview, dice, hd95 = comparison_tables(results, EACH_ITS_OWN)
    assert [row[0] for row in overview.rows] == ["gone", "UTNetV2"]
    assert dice.header == ("network", "RV", "LV", "average")
    assert dice.rows == (("gone", "85.00", "-", "85.00"), ("UTNetV2", "80.00", "90.00", "85.00"))
    assert hd95.rows[1] == ("UTNetV2", "2.00", "1.00", "1.50")
    assert "| UTNetV2 | 80.00 | 90.00 | 85.00 |" in markdown([dice])


def test_a_defeat_is_said(result: Make) -> None:
    lost = verdict([result("utnetv2", {"a": (0.8, 0.9)}), result("rival", {"a": (0.9, 0.9)})], EACH_ITS_OWN)
    assert lost == [
        "By Dice, UTNetV2 does not lead: 5.00 points behind rival.",
        "By HD95, UTNetV2 does not lead: 0.50 mm behind rival.",
    ]
    alone = [result("utnetv2", {"a": (0.9, 0.9)})]
    assert verdict(alone, EACH_ITS_OWN) == []
    assert "0.00 points behind rival" in verdict([*alone, result("rival", {"a": (0.9, 0.9)})], EACH_ITS_OWN)[0]


def test_a_lead_is_said_with_its_doubts(result: Make) -> None:
    seeds = [result("utnetv2", dict.fromkeys(CASES, (d, d)), seed=seed) for seed, d in enumerate((0.9, 0.8))]
    rivals = [result("rival", dict.fromkeys(CASES, (d, d)), seed=seed) for seed, d in enumerate((0.84, 0.84))]
    by_dice, by_hd95 = verdict([*seeds, *rivals], EACH_ITS_OWN)
    assert by_dice.startswith("By Dice, UTNetV2 leads: 1.00 points before rival (p = 0.0")
    assert by_dice.endswith("within the deviation over trainings).")
    assert by_hd95 == "By HD95, UTNetV2 leads: 0.10 mm before rival (within the deviation over trainings)."


def test_curves_have_a_column_per_share(result: Make) -> None:
    results = [
        result("utnetv2", {"a": (0.9, 0.9)}),
        result("utnetv2", {"a": (0.7, 0.7)}, share=0.1, train_cases=("t0",)),
        result("rival", {"a": (0.6, 0.6)}, share=0.1, train_cases=("t0",)),
    ]
    dice, _ = curve_tables(results)
    assert dice.header == ("network", "10% (1 scans)", "100% (2 scans)")
    assert dice.rows == (("rival", "60.00", "-"), ("UTNetV2", "70.00", "90.00"))
    assert verdict(results, EACH_ITS_OWN)[0].startswith("At 10% of the patients, by Dice, UTNetV2 leads")
    told = {
        (entry["network"], entry["share_of_patients"]): entry["dice"]["mean"]["mean"]
        for entry in numbers(results, EACH_ITS_OWN)
    }
    assert told == {("utnetv2", 1.0): 0.9, ("utnetv2", 0.1): 0.7, ("rival", 0.1): 0.6}


def test_domains_are_seen_where_a_case_with_it_was_trained_on(result: Make, tmp_path: Path) -> None:
    cases = {case.name: case for case in write_phantom(tmp_path / "demo", patients=4).cases}  # vendors A to D
    held_out = {f"patient{number:03d}_ED": (0.9 - number / 10,) * 2 for number in (1, 2, 3, 4)}
    results = [result("utnetv2", held_out, train_cases=("patient002_ES",))]
    domains = split_into_domains(results, "vendor", cases)
    assert [(domain.name, domain.seen) for domain in domains] == [("B", True), ("A", False), ("C", False), ("D", False)]
    table = domain_tables(results, domains)[0]
    assert table.header[1:3] == ("B (seen, 1 scan)", "A (unseen, 1 scan)")
    assert table.rows == (("UTNetV2", "70.00", "80.00", "60.00", "50.00"),)
    with pytest.raises(InputError, match=r"says no centre of patient001_ED; it has .*vendor"):
        split_into_domains(results, "centre", cases)
    other = result("rival", held_out, train_cases=("patient001_ES",))
    with pytest.raises(InputError, match="trained on the same domains"):
        split_into_domains([*results, other], "vendor", cases)


def test_within_a_domain_only_its_cases_count(result: Make) -> None:
    results = [result("utnetv2", {"a": (0.9, 0.9), "b": (0.5, 0.5)}), result("utnetv2", {"b": (0.4, 0.4)}, fold=1)]
    [narrowed] = within(results, Domain("A", True, ("a",)))
    assert narrowed.evaluation.mean("dice") == pytest.approx(0.9)


@pytest.mark.parametrize("change", [{"labels": ("RV",)}, {"leaks": ("all",)}, {"protocol": "paper"}])
def test_what_was_not_made_alike_cannot_be_compared(result: Make, change: dict) -> None:
    first = result("utnetv2", {"a": (0.9, 0.9)})
    check_alike([first, first])
    with pytest.raises(InputError, match="not those of"):
        check_alike([first, replace(first, evaluation=replace(first.evaluation, **change))])
    with pytest.raises(InputError, match="dataset"):
        check_alike([first, result("utnetv2", {"a": (0.9, 0.9)}, data="elsewhere")])


def test_published_weights_make_a_row_of_their_own(result: Make) -> None:
    plain = result("transunet", {"a": (0.8, 0.8)})
    begun = replace(plain, config=plain.config.model_copy(update={"pretrained": "weights.npz"}))
    assert networks_of([begun, plain]) == ["transunet", "transunet-pretrained"]
    assert title_of("transunet-pretrained") == "TransUNet †"


def test_the_csv_has_a_line_per_trial_and_class(result: Make, tmp_path: Path) -> None:
    write_csv([result("utnetv2", {"a": (0.75, NAN)}, seed=2, fold=1, share=0.5)], tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as stream:
        rv, lv = csv.DictReader(stream)
    assert (rv["network"], rv["seed"], rv["fold"], rv["share_of_patients"]) == ("utnetv2", "2", "1", "0.5")
    assert (rv["class"], rv["dice"], rv["hd95_mm"], rv["steps"]) == ("RV", "0.75", "2.5", "480")
    assert (lv["class"], lv["dice"]) == ("LV", "")


def test_the_scores_that_cost_reads_are_those_of_all_data(result: Make, tmp_path: Path) -> None:
    results = [result("utnetv2", {"a": (0.7, 0.9)}), result("utnetv2", {"a": (0.1, 0.1)}, share=0.1)]
    write_scores(results, tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text() == "network,dice\nutnetv2,0.8\n"
