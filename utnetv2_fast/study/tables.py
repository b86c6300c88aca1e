"""The results of a study as tables in the form of the paper's: markdown for readers, CSV and numbers for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utnetv2_fast.evaluation.tables import METRICS, markdown_table
from utnetv2_fast.files import write_text_atomically
from utnetv2_fast.study.results import (
    REFERENCE,
    Domain,
    Result,
    Spread,
    by_share,
    in_common,
    networks_of,
    of_network,
    over_trials,
    p_value,
    parameters_of,
    title_of,
    within,
)

NAMES = {"dice": "Dice (%)", "hd95": "HD95 (mm)"}
_SCALE = {"dice": 100.0, "hd95": 1.0}  # the paper writes Dice in per cent
_SIGN = {"dice": 1.0, "hd95": -1.0}  # of what is better


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, the first column naming the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def comparison_tables(results: Sequence[Result], patients: Mapping[str, str]) -> list[Table]:
    """What Tables 2 and 4 to 7 of the paper show: all classes together, then each, by Dice and by HD95.

    `patients` is {case: patient}.
    """
    labels, networks = results[0].evaluation.labels, networks_of(results)
    overview = []
    for network in networks:
        own = of_network(results, network)
        p = p_value(in_common(results), network, patients)
        overview.append(
            (
                title_of(network),
                f"{parameters_of(own) / 1e6:.2f}",
                _range(result.steps for result in own),
                f"{sum(result.seconds for result in own) / len(own) / 60:.1f}",
                *(_cell(over_trials(own, metric), metric) for metric in NAMES),
                "" if p is None else f"{p:.2g}",
                str(len(own)),
            )
        )
    header = ("network", "params (M)", "steps", "minutes", *NAMES.values(), "p", "trainings")
    tables = [Table("All classes", header, tuple(overview))]
    for metric, name in NAMES.items():
        rows = tuple(
            (
                title_of(network),
                *(_cell(over_trials(of_network(results, network), metric, label), metric) for label in (*labels, None)),
            )
            for network in networks
        )
        tables.append(Table(f"{name} by class", ("network", *labels, "average"), rows))
    return tables


def curve_tables(results: Sequence[Result]) -> list[Table]:
    """What Tables 1 and 3 show: networks by shares of the patients, by Dice and by HD95."""
    shares = by_share(results)
    header = ("network", *(f"{100 * share:g}% ({_scans(own)})" for share, own in shares.items()))
    return [
        Table(
            f"{name} by share of the patients",
            header,
            tuple(
                (
                    title_of(network),
                    *(_cell(over_trials(of_network(own, network), metric), metric) for own in shares.values()),
                )
                for network in networks_of(results)
            ),
        )
        for metric, name in NAMES.items()
    ]


def domain_tables(results: Sequence[Result], domains: Sequence[Domain]) -> list[Table]:
    """What Fig. 2D shows: networks (and their shares of the patients) by domain, by Dice and by HD95."""
    header = ("network", *(f"{d.name} ({'seen' if d.seen else 'unseen'}, {_count(len(d.cases))})" for d in domains))
    shares = by_share(results)
    tables = []
    for metric, name in NAMES.items():
        rows = []
        for network in networks_of(results):
            for share, of_share in shares.items():
                if own := of_network(of_share, network):
                    suffix = f", {100 * share:g}%" if len(shares) > 1 else ""
                    cells = (_cell(over_trials(within(own, domain), metric), metric) for domain in domains)
                    rows.append((title_of(network) + suffix, *cells))
        tables.append(Table(name, header, tuple(rows)))
    return tables


def verdict(results: Sequence[Result], patients: Mapping[str, str]) -> list[str]:
    """Where UTNetV2 is the best and where not, by how much, and whether that may be chance; on what all have in common.

    `patients` is {case: patient}.
    """
    common = in_common(results)
    sentences = []
    if dropped := len(results) - len(common):
        sentences.append(
            f"Not every network has all seeds and folds yet: {dropped} trainings are left out of what follows."
        )
    shares = by_share(common)
    for share, of_share in shares.items():
        rivals = [name for name in networks_of(of_share) if name != REFERENCE]
        if not rivals or not of_network(of_share, REFERENCE):
            continue
        at = f"At {100 * share:g}% of the patients, by" if len(shares) > 1 else "By"
        for metric, name in NAMES.items():
            spreads = {network: over_trials(of_network(of_share, network), metric) for network in (*rivals, REFERENCE)}
            if any(math.isnan(spread.mean) for spread in spreads.values()):
                continue
            best = max(rivals, key=lambda rival: _SIGN[metric] * spreads[rival].mean)
            lead = _SIGN[metric] * (spreads[REFERENCE].mean - spreads[best].mean) * _SCALE[metric]
            p = p_value(of_share, best, patients) if metric == "dice" else None
            deviation = max((s.std for s in (spreads[REFERENCE], spreads[best]) if not math.isnan(s.std)), default=0.0)
            doubts = [f"p = {p:.2g}"] if p is not None else []
            doubts += ["within the deviation over trainings"] if abs(lead) <= deviation * _SCALE[metric] else []
            how = "leads" if lead > 0 else "does not lead"
            where = "before" if lead > 0 else "behind"
            unit = "points" if metric == "dice" else "mm"
            sentences.append(
                f"{at} {name.split()[0]}, UTNetV2 {how}: {abs(lead):.2f} {unit} {where} {title_of(best)}"
                + (f" ({', '.join(doubts)})." if doubts else ".")
            )
    return sentences


def numbers(results: Sequence[Result], patients: Mapping[str, str]) -> list[dict[str, Any]]:
    """One entry per network and share of the patients: what the tables say, as numbers; Dice from 0 to 1.

    `patients` is {case: patient}.
    """
    entries = []
    for share, of_share in by_share(results).items():
        for network in networks_of(of_share):
            own = of_network(of_share, network)
            scores = {
                METRICS[metric]: {
                    label or "mean": _plain(over_trials(own, metric, label))
                    for label in (None, *own[0].evaluation.labels)
                }
                for metric in NAMES
            }
            entries.append(
                {
                    "network": network,
                    "share_of_patients": share,
                    "parameters": parameters_of(own),
                    "steps": [result.steps for result in own],
                    "seconds": [result.seconds for result in own],
                    "trainings": len(own),
                    "p": p_value(in_common(of_share), network, patients),
                    **scores,
                }
            )
    return entries


def markdown(tables: Sequence[Table]) -> str:
    """The tables one below the other, each under its title."""
    return "\n".join(f"**{table.title}**\n\n{markdown_table(table.header, table.rows)}" for table in tables)


def write_csv(results: Sequence[Result], file: Path) -> None:
    """One line per training and class, the scores its means over the cases."""
    header = ("network", "seed", "fold", "share_of_patients", "steps", "seconds", "class", *METRICS.values())
    rows = []
    for result in results:
        seed, fold = result.trial
        trial = (result.network, seed, fold, result.config.share_of_patients, result.steps, f"{result.seconds:.1f}")
        for label in result.evaluation.labels:
            values = (result.evaluation.summary(label, metric).mean for metric in METRICS)
            rows.append((*trial, label, *("" if math.isnan(value) else f"{value:.6g}" for value in values)))
    _write(file, header, rows)


def write_scores(results: Sequence[Result], file: Path) -> None:
    """The mean Dice (0 to 1) of every network at its largest share: what `cost --scores` reads."""
    largest = list(by_share(results).values())[-1]
    means = {network: over_trials(of_network(largest, network), "dice").mean for network in networks_of(largest)}
    _write(file, ("network", "dice"), [(name, f"{mean:.6g}") for name, mean in means.items() if not math.isnan(mean)])


def _write(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text_atomically(file, stream.getvalue())


def _cell(value: Spread, metric: str) -> str:
    if math.isnan(value.mean):
        return "-"
    scale = _SCALE[metric]
    return f"{scale * value.mean:.2f}" + ("" if math.isnan(value.std) else f" ± {scale * value.std:.2f}")


def _plain(value: Spread) -> dict[str, float]:
    return {"mean": value.mean, "std": value.std}


def _range(values: Iterable[int]) -> str:
    first, *_, last = sorted([*values] * 2)
    return str(first) if first == last else f"{first} to {last}"


def _scans(results: Sequence[Result]) -> str:
    return _range(len(result.config.train_cases) for result in results) + " scans"


def _count(scans: int) -> str:
    return f"{scans} scan" if scans == 1 else f"{scans} scans"
