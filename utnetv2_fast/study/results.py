"""What finished trials say together: means and deviations as in the paper's tables, and whether differences are chance.

A training's score is the mean over its held-out cases, a fold's the mean over its seeds, a network's the mean and the
sample deviation over folds, or over the seeds of a single fold. Against UTNetV2 patients are paired: the mean Dice of
a patient over scans, classes and seeds, compared by Wilcoxon's signed-rank test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from utnetv2_fast.data.dataset import Case
from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.folds import rules_of
from utnetv2_fast.evaluation.metrics import Evaluation
from utnetv2_fast.evaluation.tables import read_tables
from utnetv2_fast.models import NETWORKS
from utnetv2_fast.models.networks import count_parameters
from utnetv2_fast.study.folder import PRETRAINED
from utnetv2_fast.training import RunConfig, RunFolder

REFERENCE = "utnetv2"
_FEWEST_PAIRS = 6  # with fewer no difference can reach 5 % in the signed-rank test


@dataclass(frozen=True)
class Result:
    """A finished trial. `seconds` and `steps` are those of its training."""

    run: RunFolder
    config: RunConfig
    evaluation: Evaluation
    seconds: float
    steps: int

    @property
    def network(self) -> str:
        return self.config.network + (PRETRAINED if self.config.pretrained else "")

    @property
    def trial(self) -> tuple[int, int]:
        """Its seed and fold."""
        return self.config.training.seed, self.config.fold


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation (NaN of a single number)."""

    mean: float
    std: float


@dataclass(frozen=True)
class Domain:
    """The cases with one value of a column of `cases.csv`; `seen` when cases with it were trained on."""

    name: str
    seen: bool
    cases: tuple[str, ...]


def title_of(network: str) -> str:
    """How the paper's tables call it; its own name where this version does not know it."""
    name = network.removesuffix(PRETRAINED)
    title = NETWORKS[name].title if name in NETWORKS else name
    return title if name == network else f"{title} \N{DAGGER}"


def read_results(runs: Iterable[RunFolder]) -> list[Result]:
    """Of those runs that are finished, each once; InputError when one of them is damaged."""
    results = []
    for run in {run.path.resolve(): run for run in runs}.values():
        if run.scores_file.exists():
            records = run.read_metrics()
            last = records[-1] if records else {}
            if not {"seconds", "step"} <= last.keys():
                raise InputError(f"{run.metrics_file}: gone or damaged; restore it, or delete {run.path}.")
            results.append(Result(run, run.config, read_tables(run.validation_folder), last["seconds"], last["step"]))
    return results


def check_alike(results: Sequence[Result]) -> None:
    """Raises InputError unless all are of one dataset, with the same classes and rules of scoring, leaks included."""
    first = results[0]
    for other in results[1:]:
        alike = rules_of(other.evaluation) == rules_of(first.evaluation) and other.config.data == first.config.data
        if not alike:
            raise InputError(
                f"{other.run.path}: its dataset, classes, protocol or leaks are not those of {first.run.path}; compare "
                "runs that were made alike."
            )


def networks_of(results: Iterable[Result]) -> list[str]:
    """In the order of `NETWORKS`, UTNetV2 last as in the paper's tables, before it what this version does not know."""
    order = {name: place for place, name in enumerate(NETWORKS)}
    present = dict.fromkeys(result.network for result in results)
    place = {name: order.get(name.removesuffix(PRETRAINED), len(order)) for name in present}
    return sorted(present, key=lambda name: (name == REFERENCE, place[name], name))


def of_network(results: Iterable[Result], network: str) -> list[Result]:
    return [result for result in results if result.network == network]


def by_share(results: Iterable[Result]) -> Mapping[float, list[Result]]:
    """{share of the patients: its results}, the smallest share first."""
    shares: dict[float, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.config.share_of_patients):
        shares.setdefault(result.config.share_of_patients, []).append(result)
    return shares


def in_common(results: Sequence[Result]) -> list[Result]:
    """Those of the seeds and folds that every network has, share by share."""
    kept = []
    for of_share in by_share(results).values():
        trials = [{result.trial for result in of_network(of_share, name)} for name in networks_of(of_share)]
        kept += [result for result in of_share if result.trial in set.intersection(*trials)]
    return kept


def over_trials(results: Sequence[Result], metric: str, label: str | None = None) -> Spread:
    """Of one class, or (None) of the mean of all classes."""
    folds: dict[int, list[float]] = {}
    for result in results:
        score = result.evaluation.mean(metric) if label is None else result.evaluation.summary(label, metric).mean
        if not math.isnan(score):
            folds.setdefault(result.config.fold, []).append(score)
    if not folds:
        return Spread(math.nan, math.nan)
    means = [float(np.mean(seeds)) for seeds in folds.values()]
    numbers = means if len(means) > 1 else next(iter(folds.values()))
    return Spread(float(np.mean(means)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan)


def p_value(results: Sequence[Result], network: str, patients: Mapping[str, str]) -> float | None:
    """How likely chance alone makes `network` and UTNetV2 differ so on the same patients; None where it cannot be said.

    `patients` is {case: patient}. Not corrected for the number of networks.
    """
    ours, theirs = (_patient_means(of_network(results, name), patients) for name in (REFERENCE, network))
    shared = sorted(ours.keys() & theirs.keys())
    if network == REFERENCE or len(shared) < _FEWEST_PAIRS:
        return None
    differences = np.array([ours[patient] - theirs[patient] for patient in shared])
    return 1.0 if not differences.any() else float(stats.wilcoxon(differences).pvalue)


def _patient_means(results: Iterable[Result], patients: Mapping[str, str]) -> dict[str, float]:
    """{patient: mean Dice over classes, of its scans and the trials that held them out}."""
    values: dict[str, list[float]] = {}
    for result in results:
        for case in result.evaluation.cases:
            if not math.isnan(dice := result.evaluation.case_mean(case, "dice")):
                values.setdefault(patients[case], []).append(dice)
    return {patient: float(np.mean(means)) for patient, means in values.items()}


def parameters_of(results: Iterable[Result]) -> int:
    """How many numbers the network has; of trials with different ones, the most."""
    return max(count_parameters(config) for config in {result.config.model for result in results})


def cases_of(results: Sequence[Result], dataset: Iterable[Case], folder: Path) -> dict[str, Case]:
    """The dataset's cases by name; InputError when one that was trained on or held out is gone."""
    cases = {case.name: case for case in dataset}
    named = {name for result in results for name in (*result.evaluation.cases, *result.config.train_cases)}
    if gone := sorted(named - cases.keys()):
        raise InputError(f"{folder}: has no case {gone[0]} any more; restore it, or name its new place by --data.")
    return cases


def split_into_domains(results: Sequence[Result], column: str, cases: Mapping[str, Case]) -> list[Domain]:
    """The domains of all held-out cases, those that the trainings on most patients have seen first.

    Raises InputError when a held-out case has no such column in `cases.csv`, and when some of these trainings have seen
    a domain that others of them held out without having seen it.
    """
    held_out = sorted({case for result in results for case in result.evaluation.cases})
    if without := next((case for case in held_out if not cases[case].metadata.get(column)), None):
        known = sorted({name for case in cases.values() for name in case.metadata})
        raise InputError(
            f"cases.csv says no {column} of {without}; "
            + (f"it has {', '.join(known)}." if known else "add the column to it.")
        )
    seen: dict[str, bool] = {}
    for result in list(by_share(results).values())[-1]:
        trained = {cases[case].metadata.get(column) for case in result.config.train_cases}
        for name in {cases[case].metadata[column] for case in result.evaluation.cases}:
            if seen.setdefault(name, name in trained) != (name in trained):
                raise InputError(
                    f"{result.run.path}: its training saw {column} {name} or not, and others that held it out did the "
                    "opposite; name runs that were trained on the same domains."
                )
    names = sorted(seen, key=lambda name: (not seen[name], name))
    members = {name: tuple(case for case in held_out if cases[case].metadata[column] == name) for name in names}
    return [Domain(name, seen[name], members[name]) for name in names]


def within(results: Iterable[Result], domain: Domain) -> list[Result]:
    """The results as if only the cases of `domain` had been held out; those that held out none of them are left out."""
    cases = set(domain.cases)
    narrowed = []
    for result in results:
        scores = tuple(score for score in result.evaluation.scores if score.case in cases)
        if scores:
            narrowed.append(replace(result, evaluation=replace(result.evaluation, scores=scores, confusion=())))
    return narrowed
