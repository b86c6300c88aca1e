"""What is wrong with a dataset: every problem of every case, each one sentence that names the file and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from utnetv2_fast.data.dataset import Case, Dataset
from utnetv2_fast.data.nifti import Scan, grid_difference, read_label, read_scan
from utnetv2_fast.data.threads import map_in_threads
from utnetv2_fast.errors import InputError
from utnetv2_fast.progress import Track, silent


@dataclass
class CheckedCase:
    """A labelled case as read, with its problems; scan and label are None when they cannot be read."""

    problems: list[str] = field(default_factory=list)
    scan: Scan | None = None
    label: NDArray[np.uint8] | None = None
    classes: frozenset[int] = frozenset()


def check_case(dataset: Dataset, case: Case) -> CheckedCase:
    """Read one case and collect all that is wrong with it."""
    checked = CheckedCase()
    label_grid = None
    try:
        checked.scan = read_scan(case.images, len(dataset.channels))
    except InputError as error:
        checked.problems.append(str(error))
    if case.label is not None:
        try:
            checked.label, label_grid = read_label(case.label)
        except InputError as error:
            checked.problems.append(str(error))
    if checked.scan is not None:
        constant = [np.ptp(channel) == 0 for channel in checked.scan.image]
        if all(constant):
            checked.problems.append(f"{case.images[0]}: all voxels have one value; export the scan again.")
    if checked.label is not None:
        counts = np.bincount(checked.label.ravel(), minlength=256)
        checked.classes = frozenset(np.flatnonzero(counts).tolist())
        if undeclared := sorted(checked.classes - set(dataset.labels.values())):
            checked.problems.append(
                f"{case.label}: {counts[undeclared].sum()} voxels have values that dataset.json does not name "
                f"({', '.join(map(str, undeclared))}); name them there or relabel the voxels."
            )
    if checked.scan is not None and label_grid is not None:
        difference = grid_difference(checked.scan.grid, label_grid)
        if difference:
            checked.problems.append(
                f"{case.label}: its grid differs from that of {case.images[0].name} ({difference}); resample the "
                "label map to the grid of its scan."
            )
    return checked


def absent_classes(dataset: Dataset, present: Iterable[frozenset[int]]) -> list[str]:
    """A sentence for each class that no case contains."""
    found = frozenset[int]().union(*present)
    return [
        f"{dataset.folder / 'dataset.json'}: no case contains the class {name} (value {value}); leave it out or add a "
        "case that shows it."
        for name, value in dataset.labels.items()
        if value and value not in found
    ]


def find_problems(dataset: Dataset, track: Track = silent) -> list[str]:
    """Every problem of every case, in the order of the cases; an empty list means that the dataset can be used."""

    def check(case: Case) -> tuple[list[str], frozenset[int]]:
        checked = check_case(dataset, case)
        return checked.problems, checked.classes

    results = map_in_threads(check, dataset.cases, track, "Verifying")
    problems = [problem for found, _ in results for problem in found]
    return problems + absent_classes(dataset, (classes for _, classes in results))
