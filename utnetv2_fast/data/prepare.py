"""A dataset made ready to train on: verified, planned, resampled and stored as memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from utnetv2_fast.data.dataset import Case, Dataset
from utnetv2_fast.data.fingerprint import (
    Fingerprint,
    combine_measurements,
    compute_fingerprint,
    load_measurement,
    measure_case,
    save_measurement,
)
from utnetv2_fast.data.nifti import read_label, read_scan
from utnetv2_fast.data.plan import Axes, Dimensions, Plan, Preparation, make_plan
from utnetv2_fast.data.preprocess import preprocess_image, preprocess_label
from utnetv2_fast.data.threads import map_in_threads
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import atomic_write, lies_inside, read_bounded, write_text_atomically
from utnetv2_fast.progress import Track, silent
from utnetv2_fast.ranks import ALONE, Ranks
from utnetv2_fast.sharing import in_order, share

Model = TypeVar("Model", bound=BaseModel)

# Raise it when preprocessing computes other numbers than before: what was stored earlier is then made anew.
_FORMAT = 2
_LARGEST_RECORD = 2**26  # bytes of a JSON file
_FOREGROUND_PER_CLASS = 10_000
_SEED = 1234
_BY_RULE = Preparation()


@dataclass(frozen=True)
class PreparedCase:
    """The stored arrays of one case, on the plan's grid."""

    name: str
    patient: str
    image_file: Path
    label_file: Path
    foreground_file: Path
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)  # of `Case`
    axes: Axes | None = None  # its permutation of (Z, Y, X) to (D, H, W), where that is not the plan's

    def image(self) -> NDArray[np.float16]:
        """(C, D, H, W) float16, memory-mapped."""
        return np.asanyarray(np.load(self.image_file, mmap_mode="r"))

    def label(self) -> NDArray[np.uint8]:
        """(D, H, W) uint8, memory-mapped."""
        return np.asanyarray(np.load(self.label_file, mmap_mode="r"))

    def foreground(self) -> NDArray[np.int32]:
        """(k, 4): class, d, h, w of at most 10,000 voxels of each class but background, sorted by class."""
        return np.asarray(np.load(self.foreground_file))


@dataclass(frozen=True)
class Prepared:
    """A prepared folder: `plan.json` (written last: without it the folder is not complete) and `cases/`."""

    folder: Path
    plan: Plan
    cases: tuple[PreparedCase, ...]

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """Raises InputError when `folder` is not prepared, or not to the end."""
        folder = Path(folder)
        try:
            plan = Plan.model_validate_json(read_bounded(folder / "plan.json", _LARGEST_RECORD))
            records = [
                _Record.model_validate_json(read_bounded(file, _LARGEST_RECORD))
                for file in (folder / "cases").glob("*.json")
            ]
        except FileNotFoundError:
            raise InputError(f"{folder}: not a completely prepared folder; run `utnetv2-fast prepare` first.") from None
        except ValidationError as error:
            raise InputError(
                f"{folder}: holds another version's or a damaged {error.title}; prepare it anew."
            ) from None
        cases = [
            _prepared_case(folder, record.name, record.patient, record.metadata, record.axes) for record in records
        ]
        for case in cases:
            for file in (case.image_file, case.label_file, case.foreground_file):
                if not lies_inside(folder, file):
                    raise InputError(f"{file}: lies outside {folder}; prepare it anew.")
        return cls(folder, plan, tuple(sorted(cases, key=lambda case: case.name)))


class _Record(BaseModel):
    """`cases/NAME.json`, written after the arrays: which sources and which recipe they were made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    patient: str
    metadata: dict[str, str]
    axes: Axes | None = None  # as in `PreparedCase`
    sources: str
    recipe: str


class _StoredFingerprint(BaseModel):
    """`fingerprint.json`: a fingerprint and the digest of the files that it describes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: str
    fingerprint: Fingerprint


def default_folder(dataset: Dataset, dimensions: Dimensions, preparation: Preparation = _BY_RULE) -> Path:
    """Where a dataset's prepared cases go when nobody says: `prepared/FOLDER-2d` in the working directory.

    A preparation of its own has a folder of its own, `prepared/FOLDER-2d-1a2b3c4d`.
    """
    own = "" if preparation == _BY_RULE else f"-{_digest(preparation.model_dump(mode='json'))[:8]}"
    return Path("prepared") / f"{dataset.folder.resolve().name}-{dimensions}d{own}"


def prepare(
    dataset: Dataset,
    folder: Path,
    dimensions: Dimensions,
    track: Track = silent,
    preparation: Preparation = _BY_RULE,
    *,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Verify `dataset`, plan it and store every case under `folder`; only what changed since the last time is done.

    A file counts as changed when its size or its modification time does. Stopped at any point, the work goes on
    where it was when called again. All `ranks` of a job call it together and share the cases; it returns on each when
    everything is done. Raises InputError with the first problem of the dataset, and how many more, and when
    `folder` holds the cases of another dataset or for other dimensions.
    """
    folder = Path(folder)
    _refuse_foreign(folder, dataset, dimensions)
    fingerprint = _fingerprint(dataset, folder, track, ranks)
    plan = make_plan(dataset, fingerprint, dimensions, preparation)
    records = {}
    for case in dataset.cases:
        axes = plan.axes_of(fingerprint.cases[case.name].spacing)
        records[case.name] = _Record(
            name=case.name,
            patient=case.patient,
            metadata=dict(case.metadata),
            axes=None if axes == plan.axes else axes,
            sources=_sources([case]),
            recipe=_recipe(plan, axes),
        )
    plan_file, locks = folder / "plan.json", folder / ".locks"

    def store(case: Case) -> None:
        plan_file.unlink(missing_ok=True)
        _store_case(case, folder, plan, records[case.name])

    def is_stored(case: Case) -> bool:
        return _stored(_Record, _record_file(folder, case.name)) == records[case.name]

    def remove(file: Path) -> None:
        plan_file.unlink(missing_ok=True)
        _remove_case(folder, file.stem)

    share(
        remove,
        [file for file in (folder / "cases").glob("*.json") if file.stem not in records],
        name=lambda file: file.stem,
        finished=lambda file: not file.exists(),
        folder=locks,
        ranks=ranks,
        for_each=in_order,
    )
    share(
        store,
        dataset.cases,
        name=lambda case: case.name,
        finished=is_stored,
        folder=locks,
        ranks=ranks,
        for_each=partial(map_in_threads, track=track, description="Preparing"),
    )
    with atomic_write(folder / "dataset.json") as temporary:
        shutil.copyfile(dataset.folder / "dataset.json", temporary)
    write_text_atomically(plan_file, plan.model_dump_json(indent=2))
    return Prepared.load(folder)


def _refuse_foreign(folder: Path, dataset: Dataset, dimensions: Dimensions) -> None:
    """InputError when `folder` holds cases of which this dataset has none, or that are for other dimensions."""
    plan = _stored(Plan, folder / "plan.json")
    if plan is not None and plan.dimensions != dimensions:
        raise InputError(f"{folder}: prepared for {plan.dimensions}D networks; name another folder, or delete it.")
    records = [_stored(_Record, file) for file in (folder / "cases").glob("*.json")]
    stored = {record.sources for record in records if record is not None}
    if stored and stored.isdisjoint(_sources([case]) for case in dataset.cases):
        raise InputError(
            f"{folder}: holds the cases of another dataset than {dataset.folder}; name another folder, or delete it."
        )


def _fingerprint(dataset: Dataset, folder: Path, track: Track, ranks: Ranks) -> Fingerprint:
    file = folder / "fingerprint.json"
    sources = _digest([_sources(dataset.cases), dataset.channels, dataset.labels])

    def stored() -> Fingerprint | None:
        found = _stored(_StoredFingerprint, file)
        return found.fingerprint if found is not None and found.sources == sources else None

    def store(fingerprint: Fingerprint) -> None:
        content = _StoredFingerprint(sources=sources, fingerprint=fingerprint)
        write_text_atomically(file, content.model_dump_json(indent=2))

    if (fingerprint := stored()) is not None:
        return fingerprint
    if ranks.count == 1:
        fingerprint = compute_fingerprint(dataset, track)
        store(fingerprint)
        return fingerprint
    measured = folder / ".measured"

    def measurement_file(case: Case) -> Path:
        return measured / f"{case.name}.{_digest([_sources([case]), sources])[:16]}.npz"

    def combine(dataset: Dataset) -> None:
        store(combine_measurements(dataset, [load_measurement(measurement_file(case)) for case in dataset.cases]))
        shutil.rmtree(measured)

    share(
        lambda case: save_measurement(measure_case(dataset, case), measurement_file(case)),
        dataset.cases,
        name=lambda case: case.name,
        finished=lambda case: stored() is not None or measurement_file(case).exists(),
        folder=folder / ".locks",
        ranks=ranks,
        for_each=partial(map_in_threads, track=track, description="Reading"),
    )
    share(
        combine,
        [dataset],
        name=lambda _: "fingerprint",
        finished=lambda _: stored() is not None,
        folder=folder / ".locks",
        ranks=ranks,
        for_each=in_order,
    )
    if (fingerprint := stored()) is None:
        raise InputError(f"{dataset.folder}: its files were changed while they were read; prepare it again.")
    return fingerprint


def _recipe(plan: Plan, axes: Axes) -> str:
    """Digest of what the stored arrays of a case depend on, whose axes (D, H, W) are `axes`.

    Statistics of channels that are standardised per scan are not among it.
    """
    fixed = [i.model_dump() for i, kind in zip(plan.intensities, plan.normalisation, strict=True) if kind == "ct"]
    rules = [plan.resampling, plan.crop, plan.label_context]
    by_rule = rules == ["nnunet", "nonzero", None]
    return _digest(
        [_FORMAT, plan.dimensions, axes, plan.spacing, plan.normalisation, fixed, *([] if by_rule else rules)]
    )


def _sources(cases: Iterable[Case]) -> str:
    """Digest of the names, sizes and modification times of the cases' files."""
    files = [file for case in cases for file in (*case.images, case.label) if file is not None]
    return _digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _stored(kind: type[Model], file: Path) -> Model | None:
    """The model in `file`, or None when there is none that this version can read."""
    try:
        return kind.model_validate_json(read_bounded(file, _LARGEST_RECORD))
    except (FileNotFoundError, ValidationError):
        return None


def _prepared_case(
    folder: Path, name: str, patient: str, metadata: Mapping[str, str], axes: Axes | None
) -> PreparedCase:
    image, label, foreground = (folder / "cases" / f"{name}.{part}.npy" for part in ("image", "label", "foreground"))
    return PreparedCase(name, patient, image, label, foreground, metadata, axes)


def _record_file(folder: Path, name: str) -> Path:
    return folder / "cases" / f"{name}.json"


def _remove_case(folder: Path, name: str) -> None:
    case = _prepared_case(folder, name, patient="", metadata={}, axes=None)
    for file in (_record_file(folder, name), case.image_file, case.label_file, case.foreground_file):
        file.unlink(missing_ok=True)


def _store_case(case: Case, folder: Path, plan: Plan, record: _Record) -> None:
    if case.label is None:
        raise ValueError(f"case {case.name} has no label map")
    stored = _prepared_case(folder, case.name, case.patient, case.metadata, record.axes)
    reference, _ = read_label(case.label)
    image, geometry = preprocess_image(read_scan(case.images, len(plan.channels)), plan, reference)
    label = preprocess_label(reference, geometry, plan)
    largest = np.finfo(np.float16).max
    _save(stored.image_file, image.clip(-largest, largest).astype(np.float16))
    _save(stored.label_file, label)
    _save(stored.foreground_file, _foreground(label))
    write_text_atomically(_record_file(folder, case.name), record.model_dump_json(indent=2))


def _save(file: Path, array: NDArray[np.generic]) -> None:
    with atomic_write(file) as temporary:
        np.save(temporary, array)


def _foreground(label: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(k, 4): class, d, h, w of at most 10,000 voxels of each class but background, drawn without replacement."""
    flat = label.ravel()
    rows = [np.empty((0, 4), dtype=np.int32)]
    for value in range(1, int(flat.max()) + 1):
        voxels = np.flatnonzero(flat == value)
        if len(voxels) > _FOREGROUND_PER_CLASS:
            voxels = np.random.default_rng([_SEED, value]).choice(voxels, _FOREGROUND_PER_CLASS, replace=False)
        places = np.stack(np.unravel_index(voxels, label.shape), axis=1)
        rows.append(np.insert(places, 0, value, axis=1).astype(np.int32))
    return np.concatenate(rows)
