"""Which scans a dataset folder holds: nnU-Net v2 raw and Medical Segmentation Decathlon layouts, as they are."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
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
    Raises InputError for the first thing that is missing, malformed or outside the folder. No image is opened.
    """
    dataset, problems = inspect_dataset(folder)
    if problems:
        raise InputError(first_of(problems))
    return dataset


def inspect_dataset(folder: Path) -> tuple[Dataset, list[str]]:
    """As `read_dataset`, but with the cases that can be used and all problems of the others, a sentence each."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds dataset.json.")
    file = folder / "dataset.json"
    content = _read_json(file)
    if content.file_ending not in ENDINGS:
        raise InputError(f"{file}: file_ending is {content.file_ending}; convert the scans to .nii.gz first.")
    labels = _labels(file, content.labels)
    channels = tuple(content.channels[index] for index in sorted(content.channels))
    found: list[tuple[str, tuple[Path, ...], Path]]
    problems: list[str] = []
    if content.dataset:
        found = [(name, tuple(entry.images), entry.label) for name, entry in content.dataset.items()]
    elif content.training:
        found = [
            (file_stem(entry.image), _listed_images(folder, entry.image, len(channels)), entry.label)
            for entry in content.training
        ]
    else:
        scans = [scan for scan in _nifti_files(folder / "imagesTr") if scan.name.endswith(content.file_ending)]
        groups, problems = _group_channels(scans, len(channels))
        found = [
            (name, tuple(image.relative_to(folder) for image in images), Path(f"labelsTr/{name}{content.file_ending}"))
            for name, images in groups.items()
        ]
    if not found and not problems:
        raise InputError(f"{folder}: no case in it; put scans into imagesTr and label maps into labelsTr.")
    names = Counter(name for name, _, _ in found)
    problems += [
        f"{file}: names the case {name} {n} times; name every case once." for name, n in names.items() if n > 1
    ]
    patients, found_in_table = _read_patients(folder / "cases.csv", names)
    # A case whose channels are incomplete is not among the names: the table is not to blame for that.
    problems += found_in_table if not problems else []
    cases = []
    for name, images, label in sorted(found):
        if wrong := _path_problems(folder, len(channels), name, images, label):
            problems += wrong
        elif name in patients:
            patient, metadata = patients[name]
            cases.append(Case(name, tuple(folder / image for image in images), folder / label, patient, metadata))
    return Dataset(folder, content.name or folder.resolve().name, channels, labels, tuple(cases)), problems


def first_of(problems: Sequence[str]) -> str:
    """The first problem, and how many more there are."""
    return problems[0] + (f" ({len(problems) - 1} more: see `utnetv2-fast verify`)" if len(problems) > 1 else "")


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
        elif not path.name.endswith(ENDINGS):
            raise InputError(f"{path}: only .nii and .nii.gz are read; convert the scan to NIfTI first.")
        else:
            files.append(path)
    if not files:
        raise InputError("No scan to read; give .nii or .nii.gz files or a folder that holds them.")
    groups, problems = _group_channels(files, channels)
    if problems:
        raise InputError(problems[0])
    return [Case(name, images, None, name) for name, images in sorted(groups.items())]


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
        if type(value) is not int:  # a bool is one too
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


def _group_channels(files: Sequence[Path], channels: int) -> tuple[dict[str, tuple[Path, ...]], list[str]]:
    """{case: its files in the order of the channels}, and what is wrong with the cases left out."""
    matches = [re.fullmatch(r"(.+)_(\d{4})", file_stem(file)) for file in files]
    # With one channel scan_0001 may well be the name of a scan; with several, names without a channel are 4D files.
    suffixed = any(matches) if channels > 1 else all(match and match[2] == "0000" for match in matches)
    problems = []
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for file, match in zip(files, matches, strict=True):
        if suffixed and match is None:
            problems.append(f"{file}: its name lacks the channel that others have; rename it to end with _0000.")
            continue
        name, channel = (match[1], int(match[2])) if suffixed and match else (file_stem(file), 0)
        if channel in groups[name]:
            problems.append(f"{file}: by its name the same scan as {groups[name][channel]}; remove one of them.")
        groups[name].setdefault(channel, file)
    expected = set(range(channels if suffixed else 1))
    complete = {}
    for name, found in groups.items():
        folder = next(iter(found.values())).parent
        problems += [
            f"{folder}: channel {channel} of case {name} is missing; add {name}_{channel:04d}.nii.gz."
            for channel in sorted(expected - found.keys())
        ]
        problems += [
            f"{found[channel]}: channel {channel}, but the dataset has {channels} channel(s); remove it."
            for channel in sorted(found.keys() - expected)
        ]
        if found.keys() == expected:
            complete[name] = tuple(found[channel] for channel in sorted(expected))
    return complete, problems


def _read_patients(file: Path, names: Collection[str]) -> tuple[dict[str, tuple[str, Mapping[str, str]]], list[str]]:
    """{case: (patient, metadata)} of `cases.csv`, and what is wrong with it."""
    if not file.exists():
        return {name: (name, {}) for name in names}, []
    patients: dict[str, tuple[str, Mapping[str, str]]] = {}
    problems = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a table of comma-separated values in UTF-8 ({error}); save it as one.") from None
    for number, row in enumerate(rows, start=2):
        case, patient = row.pop("case", None), row.pop("patient", None)
        if not case or not patient or None in row or None in row.values():
            problems.append(f"{file}: line {number} lacks a case, a patient or a column; fill in one value per column.")
        elif case not in names:
            problems.append(f"{file}: line {number} names the case {case}, which the dataset has not; remove it.")
        elif case in patients:
            problems.append(f"{file}: line {number} names the case {case} again; keep one line per case.")
        else:
            patients[case] = patient, row
    problems += [f"{file}: no line for the case {name}; add one." for name in names if name not in patients]
    return patients, problems


def _path_problems(folder: Path, channels: int, name: str, images: tuple[Path, ...], label: Path) -> list[str]:
    # Case names become file names.
    if not re.fullmatch(r"[^./\\][^/\\]*", name):
        return [f"{folder / 'dataset.json'}: {name!r} cannot name a case; use letters, digits, - and _."]
    problems = []
    if len(images) not in (1, channels):
        problems.append(f"{folder / 'dataset.json'}: case {name} lists {len(images)} images for {channels} channels.")
    for path, what in [*((image, "image") for image in images), (label, "label map")]:
        file = folder / path
        if not file.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{file}: lies outside {folder} ({file.resolve()}); copy the file into the folder.")
        elif not file.is_file():
            problems.append(f"{file}: no such file, but it is the {what} of case {name}; add it or leave the case out.")
    return problems
