"""The results of a study as tables in the form of the paper's: markdown for readers, CSV for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utnetv2_fast.evaluation.tables import METRICS
from utnetv2_fast.files import write_text_atomically
from utnetv2_fast.study.results import (
    REFERENCE,
    Domain,
    Result,
    Spread,
    better,
    by_share,
    labels_of,
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


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, the first column naming the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def comparison_tables(results: Sequence[Result]) -> list[Table]:
    """What Tables 2 and 4 to 7 of the paper show: all classes together, then each, by Dice and by HD95."""
    labels, networks = labels_of(results), networks_of(results)
    overview = []
    for network in networks:
        own = of_network(results, network)
        p = p_value(results, network)
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
    header = ("network", "parameters (M)", "steps", "minutes", *NAMES.values(), "p", "trials")
    tables = [Table("All classes", header, tuple(overview))]
    for metric, name in NAMES.items():
        rows = tuple(
            (
                title_of(network),
                *(_cell(over_trials(of_network(results, network), metric, label), metric) for label in (*labels, None)),
            )
            for network in networks
        )
        tables.append(Table(name, ("network", *labels, "average"), rows))
    return tables


def curve_tables(results: Sequence[Result]) -> list[Table]:
    """What Tables 1 and 3 show: networks by shares of the patients, by Dice and by HD95."""
    shares = by_share(results)
    header = ("network", *(f"{share:.0%} ({_patients(of_share)})" for share, of_share in shares.items()))
    return [
        Table(
            name,
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
    header = ("network", *(f"{d.name} ({'seen' if d.seen else 'unseen'}, {len(d.cases)} scans)" for d in domains))
    shares = by_share(results)
    tables = []
    for metric, name in NAMES.items():
        rows = []
        for network in networks_of(results):
            for part, of_part in shares.items():
                own = of_network(of_part, network)
                suffix = f", {part:.0%}" if len(shares) > 1 else ""
                cells = (_cell(over_trials(within(own, domain), metric), metric) for domain in domains)
                if own:
                    rows.append((title_of(network) + suffix, *cells))
        tables.append(Table(name, header, tuple(rows)))
    return tables


def verdict(results: Sequence[Result]) -> list[str]:
    """One sentence per share of the patients and metric: where UTNetV2 is the best, and where not and by how much."""
    sentences = []
    shares = by_share(results)
    for part, of_part in shares.items():
        at = f"At {part:.0%} of the patients, " if len(shares) > 1 else ""
        means = {
            name: {m: over_trials(of_network(of_part, name), m).mean for m in NAMES} for name in networks_of(of_part)
        }
        if REFERENCE not in means or len(means) < 2:
            continue
        for metric, label in NAMES.items():
            ours = means[REFERENCE][metric]
            rivals = {name: values[metric] for name, values in means.items() if name != REFERENCE}
            best = sorted(rivals, key=lambda name: rivals[name] * (1 if metric == "hd95" else -1))[0]
            digits, unit = (2, " points") if metric == "dice" else (2, " mm")
            lead = abs(ours - rivals[best]) * _SCALE[metric]
            won = better(metric)(ours, rivals[best])
            sentences.append(
                f"{at}{'UTNetV2 leads' if won else 'UTNetV2 does not lead'} by {label.split()[0]}: "
                f"{lead:.{digits}f}{unit} {'before' if won else 'behind'} {title_of(best)}."
            )
    return sentences


def markdown(tables: Sequence[Table]) -> str:
    """The tables one below the other, numbers to the right."""
    parts = []
    for table in tables:
        lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in (table.header, *table.rows)]
        rule = "|---|" + "--:|" * (len(table.header) - 1)
        parts.append("\n".join([f"**{table.title}**", "", lines[0], rule, *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def write_csv(results: Sequence[Result], file: Path) -> None:
    """One line per trial and class, the scores its means over the cases."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("network", "seed", "fold", "share_of_patients", "steps", "seconds", "class", *METRICS.values()))
    for result in results:
        config = result.config
        trial = (config.network, config.training.seed, config.fold, config.share_of_patients)
        for label in result.evaluation.labels:
            values = (result.evaluation.summary(label, metric).mean for metric in METRICS)
            cells = ("" if math.isnan(value) else f"{value:.6g}" for value in values)
            writer.writerow((*trial, result.steps, f"{result.seconds:.1f}", label, *cells))
    write_text_atomically(file, stream.getvalue())


def _cell(value: Spread, metric: str) -> str:
    if math.isnan(value.mean):
        return "-"
    scale = _SCALE[metric]
    return f"{scale * value.mean:.2f}" + ("" if math.isnan(value.std) else f" ± {scale * value.std:.2f}")


def _range(values: Iterable[int]) -> str:
    numbers = sorted(set(values))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _patients(results: Sequence[Result]) -> str:
    counts = {len(result.config.train_cases) for result in results}
    return f"{min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "") + " scans"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
