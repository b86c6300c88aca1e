"""The scores as files: one CSV line per case and class, and a JSON summary per class."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.metrics import Evaluation, MissingClass, Score
from utnetv2_fast.files import atomic_write, write_text_atomically

METRICS = {"dice": "dice", "hd95": "hd95_mm", "nsd": "nsd"}
"""{field of `Score`: its name in files, with the unit}"""

MISSING_CLASS_RULES: dict[MissingClass, str] = {
    "diagonal": "absent from prediction and reference: no score, not counted; absent from one of them: dice 0, nsd 0, "
    "hd95 the diagonal of the scan",
    "500mm": "absent from the reference: no score, not counted, whatever was predicted; absent from the prediction: "
    "dice 0, nsd 0, hd95 500 mm, which no distance exceeds",
}


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """Write `scores.csv` and `scores.json` into `folder`, made if need be; InputError when it is a file."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, where the scores need a folder; name another.")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "scores.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["case", "class", *METRICS.values(), "reference_voxels", "predicted_voxels"])
        for score in evaluation.scores:
            values = [_cell(getattr(score, metric)) for metric in METRICS]
            writer.writerow([score.case, score.label, *values, score.reference_voxels, score.predicted_voxels])
    write_text_atomically(folder / "scores.json", json.dumps(summarise(evaluation), indent=2, allow_nan=False) + "\n")


def read_tables(folder: Path) -> Evaluation:
    """What `write_tables` wrote into `folder`, with six digits of each score.

    Raises InputError when it is not there or damaged.
    """
    try:
        summary = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        with (folder / "scores.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream, strict=True))
        if len(rows) != summary["cases"] * len(summary["classes"]):
            raise ValueError(f"{len(rows)} scores")
        scores = tuple(
            Score(
                case=row["case"],
                label=row["class"],
                reference_voxels=int(row["reference_voxels"]),
                predicted_voxels=int(row["predicted_voxels"]),
                **{metric: float(row[name] or "nan") for metric, name in METRICS.items()},
            )
            for row in rows
        )
        confusion = tuple(tuple(row) for row in summary["confusion_voxels"])
        rules = {text: rule for rule, text in MISSING_CLASS_RULES.items()}
        return Evaluation(
            tuple(summary["classes"]),
            summary["nsd_tolerance_mm"],
            scores,
            confusion,
            missing_class=rules[summary["missing_class_rule"]],
            protocol=summary.get("protocol"),
            leaks=tuple(summary.get("leaks", ())),
        )
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: not there yet; let the run finish, or evaluate its predictions.") from None
    except (ValueError, LookupError, TypeError, csv.Error):
        raise InputError(
            f"{folder}: its scores.csv or scores.json is damaged; evaluate the predictions anew."
        ) from None


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """Mean, sample deviation and number of cases per class and metric, the mean of the classes; JSON types only.

    What is undefined (a class that occurs nowhere, the deviation of one case) is None. Where the protocol is known, it
    and its leaks come first.
    """
    classes = {
        label: {
            name: {key: _or_none(value) for key, value in asdict(evaluation.summary(label, metric)).items()}
            for metric, name in METRICS.items()
        }
        for label in evaluation.labels
    }
    known = {} if evaluation.protocol is None else {"protocol": evaluation.protocol, "leaks": list(evaluation.leaks)}
    return known | {
        "cases": len(evaluation.cases),
        "mean": {name: _or_none(evaluation.mean(metric)) for metric, name in METRICS.items()},
        "classes": classes,
        "nsd_tolerance_mm": evaluation.tolerance,
        "missing_class_rule": MISSING_CLASS_RULES[evaluation.missing_class],
        "confusion_voxels": [list(row) for row in evaluation.confusion],
    }


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text as a Markdown table: the first column to the left, all others, numbers, to the right."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    lines.insert(1, "|---|" + "--:|" * (len(header) - 1))
    return "\n".join(lines) + "\n"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
