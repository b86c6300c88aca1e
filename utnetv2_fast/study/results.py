"""What finished trials say together: means and deviations as in the paper's tables, and whether differences are chance.

A trial's score is the mean over its held-out cases; a network's is the mean and the sample deviation over its trials
(folds and seeds). Against UTNetV2 the cases are paired: the mean Dice of a case over its classes and over the seeds,
compared by Wilcoxon's signed-rank test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from utnetv2_fast.data.dataset import read_dataset
from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.metrics import Evaluation
from utnetv2_fast.evaluation.tables import read_tables
from utnetv2_fast.models import NETWORKS
from utnetv2_fast.models.networks import count_parameters
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
        return self.config.network

    @property
    def title(self) -> str:
        return title_of(self.config.network)


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation (NaN of a single one) over `count` trials."""

    mean: float
    std: float
    count: int


def title_of(network: str) -> str:
    """How the paper's tables call it; its own name where this version does not know it."""
    return NETWORKS[network].title if network in NETWORKS else network


def read_results(runs: Iterable[RunFolder]) -> list[Result]:
    """Of those runs that are finished; InputError when one of them is damaged."""
    results = []
    for run in runs:
        if run.scores_file.exists():
            last = run.read_metrics()[-1]
            evaluation = read_tables(run.validation_folder)
            results.append(Result(run, run.config, evaluation, last["seconds"], last["step"]))
    return results


def networks_of(results: Sequence[Result]) -> list[str]:
    """In the order of `NETWORKS`, UTNetV2 last as in the paper's tables, before it what this version does not know."""
    order = {name: place for place, name in enumerate(NETWORKS)}
    present = dict.fromkeys(result.network for result in results)
    return sorted(present, key=lambda name: (name == REFERENCE, order.get(name, len(order)), name))


def labels_of(results: Sequence[Result]) -> tuple[str, ...]:
    """The foreground classes; InputError when the trials do not have the same."""
    labels = results[0].evaluation.labels
    if other := next((result for result in results if result.evaluation.labels != labels), None):
        raise InputError(
            f"{other.run.path}: has other classes than {results[0].run.path}; compare runs of one dataset."
        )
    return labels


def spread(values: Iterable[float]) -> Spread:
    """Of the numbers among `values`."""
    numbers = [value for value in values if not math.isnan(value)]
    mean = float(np.mean(numbers)) if numbers else math.nan
    return Spread(mean, float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan, len(numbers))


def over_trials(results: Iterable[Result], metric: str, label: str | None = None) -> Spread:
    """Of one class, or (None) of the mean of all classes."""
    evaluations = [result.evaluation for result in results]
    if label is None:
        return spread(evaluation.mean(metric) for evaluation in evaluations)
    return spread(evaluation.summary(label, metric).mean for evaluation in evaluations)


def p_value(results: Sequence[Result], network: str) -> float | None:
    """How likely chance alone makes `network` and UTNetV2 differ so on the same cases; None where it cannot be said."""
    ours, theirs = (_case_means(results, name) for name in (REFERENCE, network))
    shared = sorted(case for case in ours.keys() & theirs.keys() if not math.isnan(ours[case] + theirs[case]))
    if network == REFERENCE or len(shared) < _FEWEST_PAIRS:
        return None
    differences = np.array([ours[case] - theirs[case] for case in shared])
    return 1.0 if not differences.any() else float(stats.wilcoxon(differences).pvalue)


def _case_means(results: Sequence[Result], network: str) -> dict[str, float]:
    """{case: mean Dice of its classes, averaged over the trials that held it out}."""
    values: dict[str, list[float]] = {}
    for result in results:
        if result.network == network:
            for case in result.evaluation.cases:
                values.setdefault(case, []).append(result.evaluation.case_mean(case, "dice"))
    return {case: float(np.mean(means)) for case, means in values.items()}


def parameters_of(results: Iterable[Result]) -> int:
    """How many numbers the network has; of trials with different ones, the most."""
    return max(count_parameters(config) for config in {result.config.model for result in results})


@dataclass(frozen=True)
class Domain:
    """The cases with one value of a column of `cases.csv`; `seen` when cases with it were trained on."""

    name: str
    seen: bool
    cases: tuple[str, ...]


def split_into_domains(results: Sequence[Result], column: str, data: Path | None = None) -> list[Domain]:
    """The domains of all held-out cases, those that were trained on first.

    `data` is the dataset's folder where it is no longer at the place that the runs name. Raises InputError when its
    `cases.csv` has no such column for a held-out case.
    """
    folder = data or Path(results[0].config.data)
    metadata = {case.name: case.metadata for case in read_dataset(folder).cases}
    held_out = sorted({case for result in results for case in result.evaluation.cases})
    if without := next((case for case in held_out if not metadata.get(case, {}).get(column)), None):
        known = sorted({name for values in metadata.values() for name in values})
        raise InputError(
            f"{folder / 'cases.csv'}: says no {column} of {without}; "
            + (f"it has {', '.join(known)}." if known else "add the column.")
        )
    trained = {metadata.get(case, {}).get(column) for result in results for case in result.config.train_cases}
    names = sorted({metadata[case][column] for case in held_out}, key=lambda name: (name not in trained, name))
    return [
        Domain(name, name in trained, tuple(case for case in held_out if metadata[case][column] == name))
        for name in names
    ]


def within(results: Iterable[Result], domain: Domain) -> list[Result]:
    """The results as if only the cases of `domain` had been held out; those that held out none of them are left out."""
    cases = set(domain.cases)
    narrowed = (
        replace(
            result,
            evaluation=replace(
                result.evaluation,
                scores=tuple(score for score in result.evaluation.scores if score.case in cases),
                confusion=(),
            ),
        )
        for result in results
    )
    return [result for result in narrowed if result.evaluation.scores]


def better(metric: str) -> Callable[[float, float], bool]:
    """Whether the first of two values of `metric` is the better one."""
    return (lambda a, b: a < b) if metric == "hd95" else (lambda a, b: a > b)


def of_network(results: Iterable[Result], network: str) -> list[Result]:
    return [result for result in results if result.network == network]


def by_share(results: Iterable[Result]) -> Mapping[float, list[Result]]:
    """{share of the patients: its results}, the smallest share first."""
    shares: dict[float, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.config.share_of_patients):
        shares.setdefault(result.config.share_of_patients, []).append(result)
    return shares
