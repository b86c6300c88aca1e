"""What a study leaves for its readers: tables, figures, side-by-side pictures, and one page with all of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utnetv2_fast.data.dataset import Case, read_dataset
from utnetv2_fast.data.nifti import read_label
from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.figures import png, write_png
from utnetv2_fast.evaluation.pictures import CT_WINDOW, draw_comparison, take_view, telling_slice
from utnetv2_fast.evaluation.plots import draw_convergence
from utnetv2_fast.evaluation.report import data_uri, is_ct, rank_cases, read_first_channel, render_template
from utnetv2_fast.evaluation.tables import MISSING_CLASS_RULES
from utnetv2_fast.files import write_text_atomically
from utnetv2_fast.inference.held_out import scored_files
from utnetv2_fast.study.plots import draw_curve, draw_domains
from utnetv2_fast.study.results import (
    REFERENCE,
    Result,
    by_share,
    cases_of,
    check_alike,
    networks_of,
    of_network,
    split_into_domains,
    title_of,
    within,
)
from utnetv2_fast.study.tables import (
    Table,
    comparison_tables,
    curve_tables,
    domain_tables,
    markdown,
    numbers,
    verdict,
    write_csv,
    write_scores,
)

_MOST_SHOWN = 7  # networks beside each other


@dataclass(frozen=True)
class Outcome:
    """What a study came to.

    tables     in the paper's form
    sentences  what they say of UTNetV2, and which trainings failed
    numbers    the tables' for programs
    figures    {name: (figure, caption)}
    shown      (rank or domain, case) of the cases to show
    cases      all of the dataset, by name
    """

    title: str
    tables: list[Table]
    sentences: list[str]
    numbers: list[dict[str, Any]]
    figures: dict[str, tuple[Figure, str]]
    shown: list[tuple[str, str]]
    cases: Mapping[str, Case]


def compared(results: Sequence[Result], data: Path | None = None) -> Outcome:
    """Networks side by side (paper Tables 2 and 4 to 7, Fig. 3), and by the amount of data where that varies.

    `data` is the dataset's folder where it is no longer at the place that the runs name. Raises InputError when the
    results are not alike, and when a case is gone from the dataset.
    """
    check_alike(results)
    cases = _cases(results, data)
    patients = {name: case.patient for name, case in cases.items()}
    shares = by_share(results)
    all_data = list(shares.values())[-1]
    tables, figures = comparison_tables(all_data, patients), {}
    if len(shares) > 1:
        tables = curve_tables(results) + tables
        figures["curve"] = (draw_curve(results), "Mean Dice against the share of the patients that was trained on.")
    one_each = {title_of(name): of_network(all_data, name)[0].run.read_metrics() for name in networks_of(all_data)}
    caption = "Training loss, and Dice on validation patches: one training of each network."
    figures["convergence"] = (draw_convergence(one_each), caption)
    shown = rank_cases(_main_results(all_data)[0].evaluation)
    sentences, entries = verdict(results, patients), numbers(results, patients)
    return Outcome("Networks compared", tables, sentences, entries, figures, shown, cases)


def split_by(results: Sequence[Result], column: str, data: Path | None = None) -> Outcome:
    """The same predictions by domain (paper Fig. 2D, E): shown is the median case of each.

    `data` and errors as for `compared`, and what `split_into_domains` raises.
    """
    check_alike(results)
    cases = _cases(results, data)
    patients = {name: case.patient for name, case in cases.items()}
    domains = split_into_domains(results, column, cases)
    first = _main_results(list(by_share(results).values())[-1])
    shown = []
    for domain in domains:
        if narrowed := within(first, domain):
            ranked = dict(rank_cases(narrowed[0].evaluation))
            median = ranked.get("median") or next(iter(ranked.values()), None)
            shown += [(f"{column} {domain.name}, median", median)] if median else []
    figure = (draw_domains(results, domains), f"Mean Dice by {column}; to the right of the line what no training saw.")
    entries = [
        {column: domain.name, "seen": domain.seen, "scans": len(domain.cases), **entry}
        for domain in domains
        for entry in numbers(within(results, domain), patients)
    ]
    tables = domain_tables(results, domains)
    return Outcome(f"Scores by {column}", tables, [], entries, {"domains": figure}, shown, cases)


def write_outcome(outcome: Outcome, results: Sequence[Result], folder: Path) -> None:
    """Write `tables.md`, `trials.csv`, `scores.csv`, `report.html`, and figures and cases as PNG into `folder`.

    Raises InputError when it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, where the results need a folder; name another.")
    folder.mkdir(parents=True, exist_ok=True)
    facts, note = _facts(results), _note(results)
    settings = "".join(f"* {name}: {value}\n" for name, value in facts.items())
    sentences = "".join(f"{sentence}\n\n" for sentence in outcome.sentences)
    parts = [f"# {outcome.title}\n", settings, sentences, markdown(outcome.tables), note + "\n"]
    write_text_atomically(folder / "tables.md", "\n".join(part for part in parts if part))
    write_csv(results, folder / "trials.csv")
    write_scores(results, folder / "scores.csv")
    figures = []
    for name, (figure, caption) in outcome.figures.items():
        picture = png(figure)
        write_png(folder / f"{name}.png", picture)
        figures.append({"picture": data_uri(picture), "caption": caption})
    cases = []
    for number, (rank, name) in enumerate(outcome.shown):
        content, caption = _side_by_side(results, outcome.cases[name])
        if content is not None:
            stem = re.sub(r"[^\w-]+", "-", rank.split(",")[0])[:60]  # a domain may be called anything
            write_png(folder / "pictures" / f"{number}-{stem}.png", content)
        cases.append({"name": name, "picture": data_uri(content), "caption": f"{rank.capitalize()}: {caption}"})
    config = results[0].config
    page: dict[str, Any] = {
        "title": outcome.title,
        "subtitle": f"{config.plan.dataset}, networks beside {config.preset}",
        "protocol": config.protocol,
        "leaks": config.leaks,
        "sentences": outcome.sentences,
        "figures": figures,
        "tables": outcome.tables,
        "note": note,
        "cases": cases,
        "cases_note": "Ranked by UTNetV2's mean Dice where it took part. Shown is the slice in which reference and its "
        "errors together cover most; beside each name the mean Dice (%) of the whole case.",
        "settings": list(facts.items()),
    }
    write_text_atomically(folder / "report.html", render_template("study.html.j2", page))


def _cases(results: Sequence[Result], data: Path | None) -> dict[str, Case]:
    folder = data or Path(results[0].config.data)
    return cases_of(results, read_dataset(folder).cases, folder)


def _main_results(results: Sequence[Result]) -> list[Result]:
    """Those of UTNetV2, or of the first network where it did not take part."""
    return of_network(results, REFERENCE) or of_network(results, networks_of(results)[0])


def _note(results: Sequence[Result]) -> str:
    rule = MISSING_CLASS_RULES[results[0].evaluation.missing_class]
    return (
        "Mean ± sample deviation over folds, or over the seeds of a single fold, of the mean over the held-out cases. "
        "p: Wilcoxon's signed-rank test of the patients' mean Dice against UTNetV2's, not corrected for the number of "
        f"networks. A class {rule}."
    )


def _facts(results: Sequence[Result]) -> Mapping[str, str]:
    """What a reader must know of how the numbers came about."""
    config = results[0].config
    training = config.training
    seeds, folds = (sorted(set(numbers)) for numbers in zip(*(result.trial for result in results), strict=True))
    environments = [(result.run.read_environments() or [{}])[-1] for result in results]
    machines = {f"{e.get('device')}, {e.get('threads')} threads, {e.get('instruction_set')}" for e in environments}
    commands = {shlex.join(map(_without_folder, ("utnetv2-fast", *e.get("command", ())[1:]))) for e in environments}
    packages = environments[-1].get("packages", {})
    supervised = {title_of(r.network): getattr(r.config.model, "deep_supervision", False) for r in results}
    return {
        "Protocol": config.protocol + (f", with leaks: {', '.join(config.leaks)}" if config.leaks else ""),
        "Dataset": f"{config.plan.dataset}, in {Path(config.data).name}",
        "Classes": ", ".join(results[0].evaluation.labels),
        "Preset": config.preset,
        "Patch": " × ".join(map(str, config.patch_size)) + f" voxels, {training.batch_size} a batch",  # noqa: RUF001
        "Folds": ", ".join(map(str, folds)),
        "Seeds": ", ".join(map(str, seeds)),
        "Training": f"{training.epochs} epochs, learning rate {training.learning_rate:g}, "
        f"augmentation {training.augmentation if isinstance(training.augmentation, str) else 'its own'}",
        "Auxiliary loss": f"weight {training.auxiliary_weight:g} for "
        + (", ".join(title for title, has in supervised.items() if has) or "none"),
        "Machine": "; ".join(sorted(machines)),
        "Command": "; ".join(sorted(commands)),
        "Versions": ", ".join(f"{name} {number}" for name, number in packages.items() if number),
    }


def _without_folder(part: str) -> str:
    return Path(part).name if part.startswith("/") else part


def _side_by_side(results: Sequence[Result], case: Case) -> tuple[bytes | None, str]:
    """The picture of a case with every network's prediction, and its caption; no picture where a file is gone."""
    shown: list[Result] = []
    for network in reversed(networks_of(results)):  # UTNetV2 first, it is never the one left out
        own = [result for result in of_network(results, network) if case.name in result.evaluation.cases]
        shown += [max(own, key=lambda result: result.config.share_of_patients)] if own else []
    shown = shown[:_MOST_SHOWN]
    try:
        pairs = [scored_files([case], r.run.validation_folder, r.config.evaluation.grid)[0] for r in shown]
        reference, grid = read_label(pairs[0][2])
        predictions = [read_label(prediction)[0] for _, prediction, _ in pairs]
    except InputError as error:
        return None, f"{case.name}: no picture: {error}"
    channels = shown[0].config.plan.channels
    scan, remark = read_first_channel(case.images, channels, grid)
    axis, index = telling_slice(reference, predictions[0], grid.spacing)
    views = [take_view(scan, reference, prediction, grid.spacing, axis, index) for prediction in predictions]
    named = [
        (f"{title_of(r.network)} {100 * r.evaluation.case_mean(case.name, 'dice'):.1f}", view.prediction)
        for r, view in zip(shown, views, strict=True)
    ]
    window = CT_WINDOW if is_ct(channels[0]) else None
    figure = draw_comparison(views[0], named, results[0].evaluation.labels, case.name, window)
    return png(figure), f"{case.name}. {remark}"
