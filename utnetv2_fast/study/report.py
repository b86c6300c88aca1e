"""What a study leaves for its readers: tables, figures, side-by-side pictures, and one page with all of it."""

from __future__ import annotations

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
from utnetv2_fast.study.results import REFERENCE, Domain, Result, by_share, networks_of, of_network, title_of, within
from utnetv2_fast.study.tables import (
    Table,
    comparison_tables,
    curve_tables,
    domain_tables,
    markdown,
    verdict,
    write_csv,
)

_MOST_SHOWN = 7  # networks beside each other


@dataclass(frozen=True)
class Outcome:
    """The tables of a study, what they say in sentences, its figures by name with a caption, the cases to show."""

    title: str
    tables: list[Table]
    sentences: list[str]
    figures: dict[str, tuple[Figure, str]]
    cases: list[tuple[str, str]]  # (rank or domain, case)


def compared(results: Sequence[Result]) -> Outcome:
    """Networks side by side (paper Tables 2 and 4 to 7, Fig. 3), and by the amount of data where that varies."""
    shares = by_share(results)
    all_data = list(shares.values())[-1]
    first = _main_results(all_data)[0]
    tables, figures = comparison_tables(all_data), {}
    if len(shares) > 1:
        tables = curve_tables(results) + tables
        figures["curve"] = (draw_curve(results), "Mean Dice against the share of the patients that was trained on.")
    one_each = {title_of(name): of_network(all_data, name)[0].run.read_metrics() for name in networks_of(all_data)}
    figures["convergence"] = (
        draw_convergence(one_each),
        "Training loss and Dice on validation patches, one training each.",
    )
    return Outcome("Networks compared", tables, verdict(results), figures, rank_cases(first.evaluation))


def split_by(results: Sequence[Result], domains: Sequence[Domain], column: str) -> Outcome:
    """The same predictions by domain (paper Fig. 2D, E): shown is the median case of each."""
    first = _main_results(list(by_share(results).values())[-1])
    cases = []
    for domain in domains:
        if narrowed := within(first, domain):
            ranked = dict(rank_cases(narrowed[0].evaluation))
            median = ranked.get("median") or next(iter(ranked.values()), None)
            cases += [(f"{column} {domain.name}, median", median)] if median else []
    figure = (draw_domains(results, domains), f"Mean Dice by {column}; to the right of the line what no training saw.")
    return Outcome(f"Scores by {column}", domain_tables(results, domains), [], {"domains": figure}, cases)


def write_outcome(outcome: Outcome, results: Sequence[Result], folder: Path, data: Path | None = None) -> None:
    """Write `tables.md`, `trials.csv`, `report.html` and the PNG of every figure and case into `folder`.

    `data` is the dataset's folder where it is no longer at the place that the runs name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = _facts(results)
    settings = "".join(f"* {name}: {value}\n" for name, value in facts.items())
    sentences = "".join(f"{sentence}\n" for sentence in outcome.sentences)
    note = _note(results)
    parts = [f"# {outcome.title}\n", settings, sentences, markdown(outcome.tables), note + "\n"]
    write_text_atomically(folder / "tables.md", "\n".join(part for part in parts if part))
    write_csv(results, folder / "trials.csv")
    figures = []
    for name, (figure, caption) in outcome.figures.items():
        picture = png(figure)
        write_png(folder / f"{name}.png", picture)
        figures.append({"picture": data_uri(picture), "caption": caption})
    cases = []
    for number, (rank, name) in enumerate(outcome.cases):
        content, caption = _side_by_side(results, name, data)
        if content is not None:
            write_png(folder / "pictures" / f"{number}-{rank.split(',')[0].replace(' ', '-')}.png", content)
        cases.append({"name": name, "picture": data_uri(content), "caption": f"{rank.capitalize()}: {caption}"})
    config = results[0].config
    page: dict[str, Any] = {
        "title": outcome.title,
        "subtitle": f"{config.plan.dataset}, in place of and beside {config.preset}",
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


def _main_results(results: Sequence[Result]) -> list[Result]:
    """Those of UTNetV2, or of the first network where it did not take part."""
    return of_network(results, REFERENCE) or of_network(results, networks_of(results)[0])


def _note(results: Sequence[Result]) -> str:
    rule = MISSING_CLASS_RULES[results[0].evaluation.missing_class]
    return (
        "Mean ± sample deviation over trials (folds and seeds) of the mean over the held-out cases. p: Wilcoxon's "
        "signed-rank test of the cases' mean Dice against UTNetV2's, averaged over seeds. "
        f"A class {rule}."
    )


def _facts(results: Sequence[Result]) -> Mapping[str, str]:
    """What a reader must know of how the numbers came about."""
    config = results[0].config
    training = config.training
    seeds = sorted({result.config.training.seed for result in results})
    folds = sorted({result.config.fold for result in results})
    environment = (results[0].run.read_environments() or [{}])[-1]
    packages = environment.get("packages", {})
    return {
        "Dataset": f"{config.plan.dataset}, in {Path(config.data).name}",
        "Classes": ", ".join(results[0].evaluation.labels),
        "Preset": config.preset,
        "Patch": " × ".join(map(str, config.patch_size)) + f" voxels, {training.batch_size} a batch",  # noqa: RUF001
        "Folds": ", ".join(map(str, folds)),
        "Seeds": ", ".join(map(str, seeds)),
        "Training": f"{training.epochs} epochs, learning rate {training.learning_rate:g}, "
        f"augmentation {training.augmentation if isinstance(training.augmentation, str) else 'its own'}",
        "Machine": f"{environment.get('device')}, {environment.get('threads')} threads, "
        f"{environment.get('instruction_set')}",
        "Command": shlex.join(
            Path(part).name if part.startswith("/") else part for part in environment.get("command", ())
        ),
        "Versions": ", ".join(f"{name} {number}" for name, number in packages.items() if number),
    }


def _side_by_side(results: Sequence[Result], case: str, data: Path | None) -> tuple[bytes | None, str]:
    """The picture of a case with every network's prediction, and its caption; no picture where a file is gone."""
    shown = []
    for network in reversed(networks_of(results)):  # UTNetV2 first, it is never the one left out
        own = [result for result in of_network(results, network) if case in result.evaluation.cases]
        shown += [max(own, key=lambda result: result.config.share_of_patients)] if own else []
    shown = shown[:_MOST_SHOWN]
    try:
        source = _case(data or Path(shown[0].config.data), case)
        pairs = [scored_files([source], r.run.validation_folder, r.config.evaluation.grid)[0] for r in shown]
        reference, grid = read_label(pairs[0][2])
        predictions = [read_label(prediction)[0] for _, prediction, _ in pairs]
    except InputError as error:
        return None, f"{case}: no picture: {error}"
    channels = shown[0].config.plan.channels
    scan, remark = read_first_channel(source.images, channels, grid)
    axis, index = telling_slice(reference, predictions[0], grid.spacing)
    views = [take_view(scan, reference, prediction, grid.spacing, axis, index) for prediction in predictions]
    named = [
        (f"{title_of(r.network)} {100 * r.evaluation.case_mean(case, 'dice'):.1f}", view.prediction)
        for r, view in zip(shown, views, strict=True)
    ]
    window = CT_WINDOW if is_ct(channels[0]) else None
    return png(draw_comparison(views[0], named, results[0].evaluation.labels, case, window)), f"{case}. {remark}"


def _case(data: Path, name: str) -> Case:
    found = next((case for case in read_dataset(data).cases if case.name == name), None)
    if found is None or found.label is None:
        raise InputError(f"{data}: has no labelled case {name} any more.")
    return found
