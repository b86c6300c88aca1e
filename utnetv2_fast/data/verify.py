"""What is wrong with a dataset: every problem of every case, each one sentence that names the file and the remedy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utnetv2_fast.data.dataset import Case, Dataset
from utnetv2_fast.data.nifti import Scan, grid_difference, read_label, read_scan
from utnetv2_fast.data.threads import map_in_threads
from utnetv2_fast.errors import InputError
from utnetv2_fast.progress import Track, silent


@dataclass(frozen=True)
class CaseReport:
    """What one case tells of itself: its problems, the label values in it, a digest of its voxels (None: unread)."""

    problems: tuple[str, ...]
    classes: frozenset[int]
    digest: bytes | None


def scan_digest(scan: Scan) -> bytes:
    """Equal for scans with the same voxels, whatever their files are called and however they are compressed."""
    return hashlib.blake2b(scan.image.data, digest_size=16).digest()


def check_case(dataset: Dataset, case: Case) -> tuple[CaseReport, Scan | None, NDArray[np.uint8] | None]:
    """Read one labelled case; the scan and the label map are None when they cannot be read."""
    problems, classes, digest = [], frozenset[int](), None
    scan, label, label_grid = None, None, None
    try:
        scan = read_scan(case.images, len(dataset.channels))
        digest = scan_digest(scan)
        if scan.image.min() == scan.image.max():
            problems.append(f"{case.images[0]}: all its voxels have one value; export the scan again.")
    except InputError as error:
        problems.append(str(error))
    try:
        if case.label is not None:
            label, label_grid = read_label(case.label)
    except InputError as error:
        problems.append(str(error))
    if label is not None:
        counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in label)
        classes = frozenset(np.flatnonzero(counts).tolist())
        if undeclared := sorted(classes - set(dataset.labels.values())):
            problems.append(
                f"{case.label}: has values that dataset.json does not name ({', '.join(map(str, undeclared))}); name "
                "them there or relabel the voxels."
            )
    if scan and label_grid and (difference := grid_difference(scan.grid, label_grid)):
        problems.append(
            f"{case.label}: its grid differs from that of {case.images[0].name} ({difference}); resample the label "
            "map to the grid of its scan."
        )
    return CaseReport(tuple(problems), classes, digest), scan, label


def all_problems(dataset: Dataset, reports: Sequence[CaseReport]) -> list[str]:
    """The problems of the cases, one report each, then those that only all cases together show."""
    problems = [problem for report in reports for problem in report.problems]
    first: dict[bytes, Case] = {}
    for case, report in zip(dataset.cases, reports, strict=True):
        if report.digest is None:
            continue
        twin = first.setdefault(report.digest, case)
        if twin.patient != case.patient:
            problems.append(
                f"{case.images[0]}: the same scan as {twin.images[0].name}, which would stand in training and "
                "validation at once; remove one or give both one patient in cases.csv."
            )
    found = frozenset[int]().union(*(report.classes for report in reports))
    problems += [
        f"{dataset.folder / 'dataset.json'}: no case that can be read contains the class {name} (value {value}); leave "
        "it out or add a case that shows it."
        for name, value in dataset.labels.items()
        if value and value not in found
    ]
    return problems


def find_problems(dataset: Dataset, track: Track = silent) -> list[str]:
    """Every problem of every case, in the order of the cases; an empty list means that the dataset can be used."""

    def check(case: Case) -> CaseReport:
        return check_case(dataset, case)[0]

    return all_problems(dataset, map_in_threads(check, dataset.cases, track, "Verifying"))
