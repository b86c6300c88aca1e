"""Dice, HD95 and NSD of predicted label maps against reference ones, per case and class, on the scans' own grids.

A class that is absent from both label maps of a case has no score there: NaN, left out of every mean. One that is
absent from only one of them was missed or made up: Dice 0, NSD 0, and as HD95 the diagonal of the scan. An infinite
distance would end every mean, and leaving the case out would reward the failure; no distance in the scan exceeds its
diagonal, so no segmentation is worth less than none.

That is the rule "diagonal". The rule "500mm" is the authors' code: a class that the reference lacks has no score,
whatever was predicted, and one that was missed has Dice 0, NSD 0 and, as no distance may exceed it, 500 mm.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import surface_distance
from numpy.typing import NDArray

from utnetv2_fast.data.dataset import Dataset, read_dataset
from utnetv2_fast.data.nifti import ENDINGS, file_stem, grid_difference, read_label
from utnetv2_fast.data.threads import map_in_threads
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import write_text_atomically
from utnetv2_fast.progress import Track, silent
from utnetv2_fast.ranks import ALONE, Ranks
from utnetv2_fast.sharing import share

DEFAULT_TOLERANCE = 1.0
"""NSD's tolerance in mm: the Decathlon's for the hippocampus, and about a voxel of most scans."""

MissingClass = Literal["diagonal", "500mm"]

_LARGEST_DISTANCE = 500.0  # mm, of the rule "500mm"

# Spacings come out of float32 headers; a surface one voxel of 1 mm away counts as within 1 mm all the same.
_TOLERANCE_SLACK = 1e-4


@dataclass(frozen=True)
class Score:
    """How well one class of one case was found. NaN where the class is absent from both label maps."""

    case: str
    label: str
    dice: float
    hd95: float  # mm
    nsd: float
    reference_voxels: int
    predicted_voxels: int


@dataclass(frozen=True)
class Summary:
    """One metric over the cases that have a score. `std` is the sample deviation, NaN for fewer than two cases."""

    mean: float
    std: float
    cases: int


@dataclass(frozen=True)
class Evaluation:
    """The scores of all cases, foreground classes in the order of their values, at one NSD tolerance in mm.

    `confusion` counts the voxels of all cases by their class in the reference (row) and in the prediction (column),
    background first; it is empty where nobody counted them. `protocol` names how the label maps came about, None where
    nobody recorded it, and `leaks` what they know of the references.
    """

    labels: tuple[str, ...]
    tolerance: float
    scores: tuple[Score, ...]
    confusion: tuple[tuple[int, ...], ...] = ()
    missing_class: MissingClass = "diagonal"
    protocol: str | None = None
    leaks: tuple[str, ...] = ()

    @property
    def cases(self) -> tuple[str, ...]:
        """The names of the scored cases, in the order of their scores."""
        return tuple(dict.fromkeys(score.case for score in self.scores))

    def case_mean(self, case: str, metric: str) -> float:
        """The mean of `metric` over the classes that have a score in `case`; NaN when none has."""
        values = [getattr(score, metric) for score in self.scores if score.case == case]
        values = [value for value in values if not math.isnan(value)]
        return float(np.mean(values)) if values else math.nan

    def summary(self, label: str, metric: str) -> Summary:
        """Mean and deviation over the cases of `metric` ("dice", "hd95" or "nsd") of one class."""
        values = [getattr(score, metric) for score in self.scores if score.label == label]
        values = [value for value in values if not math.isnan(value)]
        mean = float(np.mean(values)) if values else math.nan
        return Summary(mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values))

    def mean(self, metric: str) -> float:
        """The mean of the classes' means, as nnU-Net's foreground mean: every class that occurs counts alike."""
        means = [self.summary(label, metric).mean for label in self.labels]
        means = [mean for mean in means if not math.isnan(mean)]
        return float(np.mean(means)) if means else math.nan


def dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """2 |P and R| / (|P| + |R|) of two masks of one shape; NaN when both are empty."""
    voxels = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2 * int(np.count_nonzero(prediction & reference)) / voxels if voxels else math.nan


def surface_scores(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing: Sequence[float],
    tolerance: float = DEFAULT_TOLERANCE,
    missing_class: MissingClass = "diagonal",
) -> tuple[float, float]:
    """(HD95 in mm, NSD) of two masks of one shape, 2D or 3D, with the spacing of their axes in mm.

    HD95: the larger, over both directions, of the 95th percentiles of the distances from one surface to the other,
    every surface element weighted by its area (DeepMind's definition, the one the paper reports). NSD: the share of
    both surfaces that lies within `tolerance` mm of the other one. Both take the missing-class rule of this module.
    """
    predicted, expected = bool(prediction.any()), bool(reference.any())
    if not expected and (not predicted or missing_class == "500mm"):
        return math.nan, math.nan
    if not predicted and missing_class == "500mm":
        return _LARGEST_DISTANCE, 0.0
    if not predicted or not expected:
        return math.hypot(*(n * mm for n, mm in zip(reference.shape, spacing, strict=True))), 0.0
    distances = surface_distance.compute_surface_distances(reference, prediction, spacing)
    hd95 = surface_distance.compute_robust_hausdorff(distances, 95)
    if missing_class == "500mm":
        hd95 = min(hd95, _LARGEST_DISTANCE)
    nsd = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance + _TOLERANCE_SLACK)
    return float(hd95), float(nsd)


def score_case(
    case: str,
    prediction: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    spacing: Sequence[float],
    labels: Mapping[str, int],
    tolerance: float = DEFAULT_TOLERANCE,
    missing_class: MissingClass = "diagonal",
) -> list[Score]:
    """The scores of the foreground classes of two label maps (Z, Y, X) with spacing (z, y, x) in mm."""
    scores = []
    for label, value in labels.items():
        if value == 0:
            continue
        p, r = prediction == value, reference == value
        hd95, nsd = surface_scores(p, r, spacing, tolerance, missing_class)
        overlap = math.nan if math.isnan(hd95) else dice(p, r)
        scores.append(Score(case, label, overlap, hd95, nsd, int(r.sum()), int(p.sum())))
    return scores


def count_confusion(prediction: NDArray[np.uint8], reference: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """(K, K) voxels of two label maps (Z, Y, X) with values below K = `classes`: reference class, predicted class."""
    counts = np.zeros(classes**2, dtype=np.int64)
    # Slice by slice: bincount makes eight bytes of every voxel.
    for predicted, expected in zip(prediction, reference, strict=True):
        counts += np.bincount(expected.ravel() * np.intp(classes) + predicted.ravel(), minlength=classes**2)
    return counts.reshape(classes, classes)


def evaluate_files(
    pairs: Sequence[tuple[str, Path, Path]],
    labels: Mapping[str, int],
    track: Track = silent,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    missing_class: MissingClass = "diagonal",
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Score (case, prediction file, reference file) for every foreground class of `labels` ({name: value}).

    Several ranks call it together, share the cases and all get all scores, by way of files in `folder/.scores`, which
    hold as long as the label maps do not change.

    Raises InputError for a file that cannot be read, grids that differ, and label values that `labels` does not name.
    """
    if not tolerance >= 0:
        raise InputError(f"The tolerance is {tolerance} mm; give a distance of 0 mm or more.")

    def score(pair: tuple[str, Path, Path]) -> _CaseScores:
        case, prediction_file, reference_file = pair
        (prediction, grid), (reference, reference_grid) = read_label(prediction_file), read_label(reference_file)
        if difference := grid_difference(grid, reference_grid):
            raise InputError(
                f"{prediction_file}: its grid differs from that of {reference_file} ({difference}); predict on the "
                "scan that the reference belongs to."
            )
        for file, label in ((prediction_file, prediction), (reference_file, reference)):
            if unknown := sorted(set(np.unique(label).tolist()) - set(labels.values())):
                raise InputError(
                    f"{file}: holds the label {unknown[0]}, but the classes are {', '.join(labels)} (0 to "
                    f"{len(labels) - 1}); check that it belongs to this dataset."
                )
        scores = score_case(case, prediction, reference, reference_grid.spacing, labels, tolerance, missing_class)
        return _CaseScores(scores, count_confusion(prediction, reference, len(labels)).tolist())

    if ranks.count == 1:
        results = map_in_threads(score, pairs, track, "Evaluating")
    else:
        assert folder is not None, "several ranks need a folder in common"
        rules = [dict(labels), tolerance, missing_class]
        results = _score_together(score, pairs, rules, track, folder / ".scores", ranks)
    names = tuple(label for label, value in labels.items() if value != 0)
    confusion = sum((np.array(r.confusion) for r in results), start=np.zeros((len(labels),) * 2, dtype=np.int64))
    return Evaluation(
        names,
        tolerance,
        tuple(score for result in results for score in result.scores),
        tuple(tuple(row) for row in confusion.tolist()),
        missing_class,
    )


@dataclass(frozen=True)
class _CaseScores:
    """The scores of one case, and its voxels by reference and predicted class."""

    scores: list[Score]
    confusion: list[list[int]]


def _score_together(
    score: Callable[[tuple[str, Path, Path]], _CaseScores],
    pairs: Sequence[tuple[str, Path, Path]],
    rules: list[Any],
    track: Track,
    folder: Path,
    ranks: Ranks,
) -> list[_CaseScores]:
    """[score(pair) for pair in pairs], each on one rank; by files in `folder` that are named by what they depend on.

    `rules` is what the scores depend on beside the label maps, as JSON has it.
    """

    def file(pair: tuple[str, Path, Path]) -> Path:
        case, *label_maps = pair
        stats = [label_map.stat() for label_map in label_maps]
        depends = [[(stat.st_size, stat.st_mtime_ns) for stat in stats], rules]
        return folder / f"{case}.{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.json"

    files = {pair: file(pair) for pair in pairs}
    share(
        lambda pair: write_text_atomically(files[pair], json.dumps(asdict(score(pair)))),
        pairs,
        name=lambda pair: pair[0],
        finished=lambda pair: files[pair].exists(),
        folder=folder / ".locks",
        ranks=ranks,
        for_each=partial(map_in_threads, track=track, description="Evaluating"),
    )
    stored = [json.loads(files[pair].read_text(encoding="utf-8")) for pair in pairs]
    return [_CaseScores([Score(**score) for score in s["scores"]], s["confusion"]) for s in stored]


def match_files(
    predictions: Path, references: Path, *, subset: bool = False
) -> tuple[Dataset, list[tuple[str, Path, Path]]]:
    """The dataset of `references`, and (case, prediction file, reference file) of every label map in `predictions`.

    `references` is a dataset folder, or a folder of label maps CASE.nii.gz beside dataset.json, which names the
    classes. With `subset`, references without a prediction are left out.
    Raises InputError for a prediction without reference and, without `subset`, a reference without prediction.
    """
    if (references / "dataset.json").is_file():
        dataset = read_dataset(references)
        expected = {case.name: case.label for case in dataset.cases if case.label}
    else:
        expected = _label_files(references)
        dataset = read_dataset(references.resolve().parent)
    found = _label_files(predictions)
    if surplus := sorted(set(found) - set(expected)):
        raise InputError(f"{found[surplus[0]]}: {references} has no reference for it; remove it or add its reference.")
    if not subset and (missing := sorted(set(expected) - set(found))):
        raise InputError(
            f"{predictions}: no prediction for {expected[missing[0]]} ({len(missing)} missing); predict it, or pass "
            "--subset to score the predicted cases only."
        )
    return dataset, [(case, found[case], expected[case]) for case in sorted(found)]


def evaluate_folder(
    predictions: Path,
    references: Path,
    track: Track = silent,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    missing_class: MissingClass = "diagonal",
    subset: bool = False,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Score every label map CASE.nii.gz or CASE.nii in `predictions`; `folder` and InputErrors as `evaluate_files`."""
    dataset, pairs = match_files(predictions, references, subset=subset)
    return evaluate_files(
        pairs,
        dataset.labels,
        track,
        tolerance=tolerance,
        missing_class=missing_class,
        folder=folder or predictions,
        ranks=ranks,
    )


def _label_files(folder: Path) -> dict[str, Path]:
    """{case: its label map}"""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the label maps.")
    files = sorted(f for f in folder.iterdir() if f.name.endswith(ENDINGS) and not f.name.startswith("."))
    if not files:
        raise InputError(f"{folder}: no .nii or .nii.gz file in it; give the folder that holds the label maps.")
    by_case: dict[str, Path] = {}
    for file in files:
        if (case := file_stem(file)) in by_case:
            raise InputError(f"{file}: {by_case[case].name} is a label map of the same case; leave one of them out.")
        by_case[case] = file
    return by_case
