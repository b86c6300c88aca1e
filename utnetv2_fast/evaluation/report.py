"""`report.html`: one page that opens from disk and needs nothing else, about a training, an evaluation, or both."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

import utnetv2_fast
from utnetv2_fast.data.nifti import Grid, grid_difference, read_label, read_scan
from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.figures import class_colour, png
from utnetv2_fast.evaluation.metrics import Evaluation, match_files
from utnetv2_fast.evaluation.pictures import CT_WINDOW, draw_case, take_view, telling_slice
from utnetv2_fast.evaluation.plots import draw_scores
from utnetv2_fast.evaluation.tables import METRICS, MISSING_CLASS_RULES, summarise
from utnetv2_fast.files import write_text_atomically

UNDEFINED = "\N{EN DASH}"
NOT_RECORDED = "not recorded"
_DIGITS = {"dice": 3, "hd95": 2, "nsd": 3}
_PROTOCOLS = {
    "clean": "Data and training by nnU-Net's rules.",
    "paper": "Data, training and scores as in the authors' published code.",
}
_WITHOUT_LEAKS = "Folds grouped by patient, the final averaged weights, every scan scored on its own grid."


@dataclass(frozen=True)
class CaseFiles:
    """Where a scored case lies; `images` is empty where its scan is not at hand."""

    images: tuple[Path, ...]
    reference: Path
    prediction: Path


@dataclass(frozen=True)
class PicturedCase:
    """One of the cases that the page shows; `picture` is None where it cannot be drawn, and `remark` says why."""

    rank: str
    name: str
    picture: bytes | None
    remark: str
    voxel_ml: float


@dataclass(frozen=True)
class Training:
    """What a run folder tells of its training, finished or not.

    records        of metrics.jsonl, one per finished epoch
    settings       the part of the configuration that a reader looks for, in words
    configuration  the text of config.yaml
    environments   of environment.json, one per start
    resources      of resources.json
    curves         the figure of loss and Dice, a PNG; None before the first epoch has finished
    patches        the picture of the validation patches, a PNG
    """

    records: Sequence[Mapping[str, Any]]
    epochs: int
    settings: Mapping[str, Any]
    configuration: str
    environments: Sequence[Mapping[str, Any]]
    resources: Mapping[str, float]
    curves: bytes | None = None
    patches: bytes | None = None


@dataclass(frozen=True)
class Report:
    """What a page shows. `protocol` is None where nobody recorded how the label maps were made.

    `scores_figure`, a PNG, and `cases` belong to `evaluation`.
    """

    title: str
    subtitle: str
    protocol: str | None
    leaks: tuple[str, ...] = ()
    training: Training | None = None
    evaluation: Evaluation | None = None
    scores_figure: bytes | None = None
    cases: Sequence[PicturedCase] = ()


def write_report(file: Path, report: Report) -> None:
    """Write the page atomically."""
    write_text_atomically(file, render(report))


def render(report: Report) -> str:
    """The page as HTML: styles and pictures inside, no script, no reference to anything outside."""
    return render_template("report.html.j2", _page(report))


def render_template(name: str, content: Mapping[str, Any]) -> str:
    """A page by the template `name` of this package, into which `version` and `written` are put too."""
    folder = resources.files(__package__)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda template: folder.joinpath(template).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(name).render(content, version=utnetv2_fast.__version__, written=written)


def report_on_folder(evaluation: Evaluation, predictions: Path, references: Path) -> Report:
    """The report on the label maps of a folder, of which nothing is known but what `evaluate_folder` made of them."""
    dataset, pairs = match_files(predictions, references, subset=True)
    images = {case.label: case.images for case in dataset.cases}
    files = {case: CaseFiles(images.get(reference, ()), reference, prediction) for case, prediction, reference in pairs}
    return Report(
        title=predictions.resolve().name,
        subtitle=f"Label maps of {predictions}, compared with those of {dataset.name}",
        protocol=None,
        evaluation=evaluation,
        scores_figure=png(draw_scores(evaluation)),
        cases=picture_cases(evaluation, files, dataset.channels),
    )


def rank_cases(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(rank, case) of the worst, the median and the best case by mean Dice; fewer where there are fewer cases.

    A case in which no class has a score has no rank.
    """
    dice = {case: evaluation.case_mean(case, "dice") for case in evaluation.cases}
    order = sorted((case for case in dice if not math.isnan(dice[case])), key=lambda case: (dice[case], case))
    if len(order) == 1:
        return [("only", order[0])]
    places = [("worst", 0), ("median", len(order) // 2), ("best", len(order) - 1)]
    return [(rank, order[place]) for rank, place in places if order and (rank != "median" or len(order) > 2)]


def picture_cases(
    evaluation: Evaluation, files: Mapping[str, CaseFiles], channels: Sequence[str]
) -> list[PicturedCase]:
    """Pictures of the worst, the median and the best case, of the first channel of their scans.

    A scan or a label map that can no longer be read leaves a remark in the place of its picture.
    """
    return [
        _picture_case(rank, case, files[case], channels, evaluation.labels) for rank, case in rank_cases(evaluation)
    ]


def _picture_case(
    rank: str, case: str, files: CaseFiles, channels: Sequence[str], labels: Sequence[str]
) -> PicturedCase:
    try:
        (reference, grid), (prediction, _) = read_label(files.reference), read_label(files.prediction)
    except InputError as error:
        return PicturedCase(rank, case, None, f"No picture: {error}", math.nan)
    scan, remark = read_first_channel(files.images, channels, grid)
    axis, index = telling_slice(reference, prediction, grid.spacing)
    view = take_view(scan, reference, prediction, grid.spacing, axis, index)
    figure = draw_case(view, labels, case, CT_WINDOW if is_ct(channels[0]) else None)
    return PicturedCase(rank, case, png(figure), remark, math.prod(grid.spacing) / 1000)


def read_first_channel(
    images: Sequence[Path], channels: Sequence[str], grid: Grid
) -> tuple[NDArray[np.float32] | None, str]:
    """The first channel (Z, Y, X) of a scan and how it is shown, or None and why there is none to show."""
    if not images:
        return None, "The scan is not in the dataset: the label maps are shown without it."
    try:
        scan = read_scan(images, len(channels))
    except InputError as error:
        return None, f"The scan cannot be shown: {error}"
    if difference := grid_difference(scan.grid, grid):
        return None, f"The scan cannot be shown: its grid is not that of the label maps ({difference})."
    if is_ct(channels[0]):
        return scan.image[0], "{}, window {:.0f} to {:.0f} HU.".format(channels[0], *CT_WINDOW)
    return scan.image[0], f"{channels[0]}, black to white the 1st to the 99.5th percentile of what is shown."


def is_ct(channel: str) -> bool:
    return channel.lower() == "ct"


def _page(report: Report) -> dict[str, Any]:
    """What the template asks for."""
    evaluation, training = report.evaluation, report.training
    remarks = []
    if training is not None and evaluation is None:
        done = len(training.records)
        remarks.append(
            f"{done} of {training.epochs} epochs are finished. There are no scores yet: the held-out scans are "
            "predicted and scored after the last epoch."
        )
    page: dict[str, Any] = {
        "title": report.title,
        "subtitle": report.subtitle,
        "protocol": _protocol(report),
        "leaks": report.leaks,
        "remarks": remarks,
        "scores": None,
        "training": None if training is None else _training(training, evaluation),
    }
    return page if evaluation is None else page | _scores(evaluation, report.scores_figure, report.cases)


def _protocol(report: Report) -> dict[str, str]:
    if report.protocol is None:
        return {
            "name": NOT_RECORDED,
            "meaning": "These label maps were scored as they are, on their own grids; how they were made is not known.",
        }
    rules = _PROTOCOLS.get(report.protocol)
    if rules is not None and not report.leaks:
        rules = f"{rules} {_WITHOUT_LEAKS}"
    return {"name": report.protocol, "meaning": rules or ""}


def _scores(evaluation: Evaluation, figure: bytes | None, cases: Sequence[PicturedCase]) -> dict[str, Any]:
    """The same numbers as scores.json, as text."""
    summary = summarise(evaluation)
    rows = [
        {
            "label": label,
            "colour": class_colour(index),
            "cells": [
                {key: _text(values[name][key], _DIGITS[metric]) for key in ("mean", "std")}
                for metric, name in METRICS.items()
            ],
            "cases": values["dice"]["cases"],
        }
        for index, (label, values) in enumerate(summary["classes"].items())
    ]
    means = [_text(summary["mean"][name], _DIGITS[metric]) for metric, name in METRICS.items()]
    tolerance = f"{evaluation.tolerance:g}"
    return {
        "headline": [
            ("mean Dice", means[0]),
            ("mean HD95 (mm)", means[1]),
            (f"mean NSD ({tolerance} mm)", means[2]),
            ("scored case" if summary["cases"] == 1 else "scored cases", summary["cases"]),
        ],
        "scores": {
            "rows": rows,
            "mean": means,
            "cases": summary["cases"],
            "figure": data_uri(figure),
        },
        "tolerance": tolerance,
        "missing_class_rule": MISSING_CLASS_RULES[evaluation.missing_class],
        "absent": [label for label, values in summary["classes"].items() if not values["dice"]["cases"]],
        "case_rows": _case_rows(evaluation),
        "cases": [_case(case, evaluation) for case in cases],
        "confusion": _confusion(evaluation),
    }


def _case_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    dice = {(score.case, score.label): score.dice for score in evaluation.scores}
    mean = {case: evaluation.case_mean(case, "dice") for case in evaluation.cases}
    order = sorted(mean, key=lambda case: (math.isnan(mean[case]), mean[case], case))
    return [
        {
            "case": case,
            "dice": _text(mean[case], 3),
            "classes": [_text(dice[case, label], 3) for label in evaluation.labels],
            "hd95": _text(evaluation.case_mean(case, "hd95"), 2),
        }
        for case in order
    ]


def _case(case: PicturedCase, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "rank": case.rank.capitalize(),
        "name": case.name,
        "picture": data_uri(case.picture),
        "remark": case.remark,
        "dice": _text(evaluation.case_mean(case.name, "dice"), 3),
        "rows": [
            {
                "label": score.label,
                "absent": math.isnan(score.dice),
                "dice": _text(score.dice, 3),
                "hd95": _text(score.hd95, 2),
                "reference": _text(score.reference_voxels * case.voxel_ml, 1),
                "predicted": _text(score.predicted_voxels * case.voxel_ml, 1),
            }
            for score in evaluation.scores
            if score.case == case.name
        ],
    }


def _confusion(evaluation: Evaluation) -> dict[str, Any] | None:
    """Every voxel count with its share of the row, in percent; None where the voxels were not counted."""
    if not evaluation.confusion:
        return None
    labels = ("background", *evaluation.labels)
    rows = []
    for expected, counts in enumerate(evaluation.confusion):
        total = sum(counts)
        cells = []
        for predicted, voxels in enumerate(counts):
            cells.append(
                {
                    "share": f"{100 * voxels / total:.1f}" if total else UNDEFINED,
                    "voxels": f"{voxels:,}".replace(",", "\N{THIN SPACE}"),
                    "colour": _shade(voxels / max(1, total), right=expected == predicted),
                }
            )
        rows.append({"label": labels[expected], "cells": cells})
    return {"labels": labels, "rows": rows}


def _shade(share: float, *, right: bool) -> str:
    """Blue where the classes agree, orange where they do not; the root makes errors of a few per cent visible."""
    return f"rgba(0, 114, 178, {0.4 * share:.3f})" if right else f"rgba(230, 159, 0, {0.8 * math.sqrt(share):.3f})"


def _training(training: Training, evaluation: Evaluation | None) -> dict[str, Any]:
    return {
        "curves": data_uri(training.curves),
        "patches": data_uri(training.patches),
        "costs": list(_costs(training, evaluation)),
        "settings": list(training.settings.items()),
        "configuration": training.configuration,
        "environment": list(_environment(training.environments)),
    }


def _costs(training: Training, evaluation: Evaluation | None) -> Iterator[tuple[str, str]]:
    """Times and memory; what nobody measured says so."""
    yield "Epochs", f"{len(training.records)} of {training.epochs}"
    last = training.records[-1] if training.records else {}
    seconds, steps = last.get("seconds"), last.get("step")
    yield "Training", NOT_RECORDED if seconds is None else duration(seconds)
    if seconds is not None:
        yield "Training, per epoch", duration(seconds / len(training.records))
    if seconds is not None and steps:
        yield "Training, per step", duration(seconds / steps)
    cases = len(evaluation.cases) if evaluation else 0
    for name, key in (("Prediction", "prediction_seconds"), ("Scoring", "scoring_seconds")):
        value = training.resources.get(key)
        if evaluation is not None:
            yield name, NOT_RECORDED if value is None else duration(value)
            if value is not None and cases:
                yield f"{name}, per case", duration(value / cases)
    for name, key in (("Largest memory", "peak_memory_bytes"), ("Largest GPU memory", "peak_gpu_memory_bytes")):
        value = training.resources.get(key)
        if value is not None:
            yield name, f"{value / 2**30:.2f} GiB"
        elif key == "peak_memory_bytes":
            yield name, NOT_RECORDED


def _environment(environments: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The last start; how often the run was started, where that was more than once."""
    if not environments:
        return
    if len(environments) > 1:
        yield "Starts", f"{len(environments)}; the last one:"
    for name, value in environments[-1].items():
        if name == "command":
            value = shlex.join(value)
        elif isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
        yield name[:1].upper() + name[1:].replace("_", " "), str(value)


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 05 s, 4.2 s or 130 ms."""
    if round(seconds, 3) < 1:
        return f"{1000 * seconds:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _text(value: float | None, digits: int) -> str:
    return UNDEFINED if value is None or math.isnan(value) else f"{value:.{digits}f}"


def data_uri(content: bytes | None) -> str | None:
    return None if content is None else "data:image/png;base64," + base64.b64encode(content).decode("ascii")
