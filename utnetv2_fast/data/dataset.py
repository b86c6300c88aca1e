"""Which scans a dataset folder holds: nnU-Net v2 raw and Medical Segmentation Decathlon layouts, as they are."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from utnetv2_fast.data.nifti import ENDINGS, file_stem
from utnetv2_fast.errors import InputError


@dataclass(frozen=True)
class Case:
    """One scan: a file per channel (or one 4D file for all), its label map when there is one, whose scan it is."""

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset; `labels` maps names to 0 (background), 1, 2, ...; `cases` are sorted by name."""

    folder: Path
    name: str
    channels: tuple[str, ...]
    labels: dict[str, int]
    cases: tuple[Case, ...]


class _MsdEntry(BaseModel):
    image: Path
    label: Path


class _NnunetEntry(BaseModel):
    images: list[Path]
    label: Path


class _DatasetFile(BaseModel):
    """The parts of dataset.json that are used, in nnU-Net's spelling or the Decathlon's."""

    model_config = ConfigDict(extra="ignore")

    name: str | None = None
    channels: dict[int, str] = Field(validation_alias=AliasChoices("channel_names", "modality"), min_length=1)
    labels: dict[str, Any]
    file_ending: str = ".nii.gz"
    dataset: dict[str, _NnunetEntry] | None = None
    training: list[_MsdEntry] | None = None


def read_dataset(folder: Path) -> Dataset:
    """Read `folder/dataset.json`, find the files of every case and, with `folder/cases.csv`, its patient.

    nnU-Net v2 raw: `imagesTr/CASE_0000.nii.gz` (one file per channel) and `labelsTr/CASE.nii.gz`, or the paths under
    "dataset"; Decathlon: the paths under "training". `cases.csv` has the columns case, patient and any others, which
    become `Case.metadata`; without it every case is a patient of its own.
    Raises InputError for whatever is missing, malformed or outside the folder. No image is opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds dataset.json.")
    file = folder / "dataset.json"
    content = _read_json(file)
    channels = tuple(content.channels[index] for index in sorted(content.channels))
    if content.file_ending not in ENDINGS:
        raise InputError(f"{file}: file_ending is {content.file_ending}; convert the scans to .nii.gz first.")
    if content.dataset:
        found = [(name, tuple(entry.images), entry.label) for name, entry in content.dataset.items()]
    elif content.training:
        found = [
            (file_stem(entry.image), _listed_images(folder, entry.image, len(channels)), entry.label)
            for entry in content.training
        ]
    else:
        found = [
            (
                name,
                tuple(image.relative_to(folder) for image in images),
                Path("labelsTr") / f"{name}{content.file_ending}",
            )
            for name, images in _group_channels(
                (image for image in _nifti_files(folder / "imagesTr") if image.name.endswith(content.file_ending)),
                len(channels),
            ).items()
        ]
    if not found:
        raise InputError(f"{folder}: no case in it; put scans into imagesTr and label maps into labelsTr.")
    patients = _read_patients(folder / "cases.csv", [name for name, _, _ in found])
    cases = [
        _checked_case(folder, len(channels), name, images, label, *patients[name])
        for name, images, label in sorted(found)
    ]
    if repeated := [name for name, count in Counter(case.name for case in cases).items() if count > 1]:
        raise InputError(f"{file}: lists the case {repeated[0]} more than once; give every case one name.")
    return Dataset(folder, content.name or folder.resolve().name, channels, _labels(file, content.labels), tuple(cases))


def list_scans(files_or_folders: Sequence[Path], channels: int) -> list[Case]:
    """The scans to predict among files and folders, sorted by name, without labels.

    Several channels: `CASE_0000.nii.gz`, `CASE_0001.nii.gz`, ..., or one 4D file per case. One channel: any NIfTI
    file; `_0000` is left out of the case's name when every file ends so. Raises InputError for nothing found,
    missing channels, and two scans of one name.
    """
    files = []
    for path in map(Path, files_or_folders):
        if path.is_dir():
            found = _nifti_files(path)
            if not found:
                raise InputError(f"{path}: no .nii or .nii.gz file in it; give the folder that holds the scans.")
            files += found
        elif not path.is_file():
            raise InputError(f"{path}: no such file or folder; check the path.")
        else:
            files.append(path)
    if not files:
        raise InputError("No scan to read; give .nii or .nii.gz files or a folder that holds them.")
    return [Case(name, images, None, name) for name, images in sorted(_group_channels(files, channels).items())]


def _read_json(file: Path) -> _DatasetFile:
    if not file.is_file():
        raise InputError(
            f"{file.parent}: no dataset.json in it; give an nnU-Net or Medical Segmentation Decathlon folder, or make "
            "one with `utnetv2-fast convert`."
        )
    try:
        return _DatasetFile.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise InputError(f"{file}: {where}: {first['msg']}; correct it as nnU-Net's dataset.json has it.") from None


def _labels(file: Path, labels: dict[str, Any]) -> dict[str, int]:
    """{name: value}, sorted by value, from nnU-Net's {name: value} or the Decathlon's {value: name}."""
    if labels and all(key.isdecimal() for key in labels):
        labels = {str(name): int(value) for value, name in labels.items()}
    if "ignore" in labels:
        raise InputError(f'{file}: the "ignore" label is not supported; leave it out and relabel its voxels.')
    for name, value in labels.items():
        if isinstance(value, list):
            raise InputError(f"{file}: label {name} is a region (a list of values), not supported; give it one value.")
        if not isinstance(value, int):
            raise InputError(f"{file}: label {name} has the value {value!r}; give it an integer.")
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    if list(ordered.values()) != list(range(len(ordered))) or not 2 <= len(ordered) <= 256:
        raise InputError(
            f"{file}: the label values are {list(ordered.values())}; use 0 (background), 1, 2, ... without gaps."
        )
    if next(iter(ordered)).lower() != "background":
        raise InputError(f'{file}: label 0 is called {next(iter(ordered))}; label 0 must be "background".')
    return ordered


def _nifti_files(folder: Path) -> list[Path]:
    """Sorted; without hidden files, such as the `._` companions that macOS writes."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; put the scans there.")
    return sorted(file for file in folder.iterdir() if file.name.endswith(ENDINGS) and not file.name.startswith("."))


def _listed_images(folder: Path, image: Path, channels: int) -> tuple[Path, ...]:
    """The files of a Decathlon entry: the one it names, or, as nnU-Net v1 lists them, CASE_0000, CASE_0001, ..."""
    if (folder / image).exists():
        return (image,)
    stem = file_stem(image)
    split = tuple(image.with_name(f"{stem}_{c:04d}{image.name.removeprefix(stem)}") for c in range(channels))
    return split if (folder / split[0]).exists() else (image,)


def _group_channels(files: Iterable[Path], channels: int) -> dict[str, tuple[Path, ...]]:
    """{case: its files in the order of the channels}; InputError for two files of one channel and for gaps."""
    files = list(files)
    suffixed = [re.fullmatch(r"(.+)_(\d{4})", file_stem(file)) for file in files]
    if channels > 1 and any(suffixed) and not all(suffixed):
        odd = files[suffixed.index(None)]
        raise InputError(f"{odd}: its name lacks the channel that other names have; rename it CASE_0000.nii.gz.")
    if not all(match and (channels > 1 or match[2] == "0000") for match in suffixed):
        suffixed = [None] * len(files)
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for file, match in zip(files, suffixed, strict=True):
        name, channel = (match[1], int(match[2])) if match else (file_stem(file), 0)
        if channel in groups[name]:
            raise InputError(f"{file}: {groups[name][channel]} is the same scan by its name; leave one of them out.")
        groups[name][channel] = file
    for name, found in groups.items():
        expected = range(channels) if any(suffixed) else range(1)
        if surplus := sorted(set(found) - set(expected)):
            raise InputError(f"{found[surplus[0]]}: channel {surplus[0]} of {channels} named channels; remove it.")
        if missing := sorted(set(expected) - set(found)):
            folder = next(iter(found.values())).parent
            raise InputError(
                f"{folder}: channel {missing[0]} of case {name} is missing; add {name}_{missing[0]:04d}.nii.gz."
            )
    return {name: tuple(file for _, file in sorted(found.items())) for name, found in groups.items()}


def _read_patients(file: Path, names: Sequence[str]) -> dict[str, tuple[str, Mapping[str, str]]]:
    """{case: (patient, metadata)}"""
    if not file.exists():
        return {name: (name, {}) for name in names}
    with file.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    known = set(names)
    patients: dict[str, tuple[str, Mapping[str, str]]] = {}
    for number, row in enumerate(rows, start=2):
        if not row.get("case") or not row.get("patient") or None in row or None in row.values():
            raise InputError(
                f"{file}: line {number} lacks a case, a patient or a column; fill in one value per column."
            )
        if row["case"] not in known:
            raise InputError(
                f"{file}: line {number} names the case {row['case']}, which the dataset has not; remove it."
            )
        if row["case"] in patients:
            raise InputError(f"{file}: line {number} names the case {row['case']} again; keep one line per case.")
        metadata = {column: value for column, value in row.items() if column not in ("case", "patient")}
        patients[row["case"]] = row["patient"], metadata
    if missing := [name for name in names if name not in patients]:
        raise InputError(f"{file}: no line for the case {missing[0]}; add one.")
    return patients


def _checked_case(
    folder: Path,
    channels: int,
    name: str,
    images: tuple[Path, ...],
    label: Path,
    patient: str,
    metadata: Mapping[str, str],
) -> Case:
    # Case names become file names.
    if not re.fullmatch(r"[^./\\][^/\\]*", name):
        raise InputError(f"{folder / 'dataset.json'}: {name!r} cannot name a case; use letters, digits, - and _.")
    if len(images) not in (1, channels):
        raise InputError(
            f"{folder / 'dataset.json'}: case {name} has {len(images)} images for {channels} channels; list one each."
        )
    for path in (*images, label):
        file = folder / path
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{folder / 'dataset.json'}: {path} lies outside {folder}; copy the file into the folder.")
        if not file.is_file():
            what = "label map" if path == label else "image"
            raise InputError(f"{file}: no such file, but it is the {what} of case {name}; add it.")
    return Case(name, tuple(folder / image for image in images), folder / label, patient, metadata)
