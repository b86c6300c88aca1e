"""Which scans a dataset folder holds: nnU-Net v2 raw and Medical Segmentation Decathlon layouts, as they are."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from utnetv2_fast.data.dicom import is_series
from utnetv2_fast.data.nifti import ENDINGS, file_stem
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import lies_inside, read_bounded

# Bytes of dataset.json and of cases.csv; a dataset of a hundred thousand cases needs a fifth of it.
_LARGEST_TABLE = 2**26
_LONGEST_NAME = 200  # of a case: file systems allow 255, and it gets endings
_LONGEST_PATH = 2000


@dataclass(frozen=True)
class Case:
    """One scan: a file per channel (or one 4D file for all), its label map when there is one, whose scan it is.

    A scan to predict may also be a folder, that of a DICOM series.
    """

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


def _plain_text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has characters that cannot be printed")
    return text


def _usable_path(path: Path) -> Path:
    _plain_text(str(path))
    if len(str(path)) > _LONGEST_PATH or any(len(part.encode()) > 255 for part in path.parts):
        raise ValueError("is longer than the name of a file can be")
    return path


_Text = Annotated[str, AfterValidator(_plain_text)]
_File = Annotated[Path, AfterValidator(_usable_path)]


class _MsdEntry(BaseModel):
    image: _File
    label: _File


class _NnunetEntry(BaseModel):
    images: list[_File]
    label: _File


class _DatasetFile(BaseModel):
    """The parts of dataset.json that are used, in nnU-Net's spelling or the Decathlon's."""

    model_config = ConfigDict(extra="ignore")

    name: _Text | None = None
    channels: dict[int, _Text] = Field(validation_alias=AliasChoices("channel_names", "modality"), min_length=1)
    labels: dict[_Text, Any]
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
    file; `_0000` is left out of the case's name when every file ends so; or a folder with a DICOM series, whose name
    is the folder's. Raises InputError for nothing found, missing channels, and two scans of one name.
    """
    files, series = [], []
    for path in map(Path, files_or_folders):
        if path.is_dir():
            found = _nifti_files(path)
            files += found
            if not found and not is_series(path):
                raise InputError(f"{path}: no .nii, .nii.gz or DICOM file in it; give the folder that holds the scans.")
            series += [] if found else [path]
        elif not path.is_file():
            raise InputError(f"{path}: no such file or folder; check the path.")
        elif not path.name.endswith(ENDINGS):
            raise InputError(
                f"{path}: only .nii and .nii.gz files are read, and folders of DICOM series; convert the scan first."
            )
        else:
            files.append(path)
    if not files and not series:
        raise InputError("No scan to read; give .nii or .nii.gz files or a folder that holds them.")
    if series and channels > 1:
        raise InputError(f"{series[0]}: a DICOM series is one of {channels} channels; convert them all to NIfTI.")
    groups, problems = _group_channels(files, channels)
    if problems:
        raise InputError(problems[0])
    for folder in series:
        name = folder.resolve().name
        if name in groups:
            raise InputError(f"{folder}: by its name the same scan as {groups[name][0]}; rename one of them.")
        groups[name] = (folder,)
    return [Case(name, images, None, name) for name, images in sorted(groups.items())]


def _read_json(file: Path) -> _DatasetFile:
    if not file.is_file():
        raise InputError(
            f"{file.parent}: no dataset.json in it; give an nnU-Net or Medical Segmentation Decathlon folder, or make "
            "one with `utnetv2-fast convert`."
        )
    try:
        return _DatasetFile.model_validate_json(read_bounded(file, _LARGEST_TABLE))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise InputError(
            f"{file}: {where[:100]}: {first['msg'][:200]}; correct it as nnU-Net's dataset.json has it."
        ) from None


def _labels(file: Path, labels: dict[str, Any]) -> dict[str, int]:
    """{name: value}, sorted by value, from nnU-Net's {name: value} or the Decathlon's {value: name}."""
    if labels and all(key.isdecimal() and len(key) <= 3 for key in labels):
        labels = {str(name): int(value) for value, name in labels.items()}
    if unprintable := [name for name in labels if not name.isprintable()]:
        raise InputError(f"{file}: the label {unprintable[0][:80]!r} cannot be printed; give it another name.")
    if "ignore" in labels:
        raise InputError(f'{file}: the "ignore" label is not supported; leave it out and relabel its voxels.')
    for name, value in labels.items():
        if isinstance(value, list):
            raise InputError(
                f"{file}: label {name[:80]} is a region (a list of values), not supported; give it one value."
            )
        if type(value) is not int:  # a bool is one too
            raise InputError(f"{file}: label {name[:80]} has the value {str(value)[:80]!r}; give it an integer.")
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    if list(ordered.values()) != list(range(len(ordered))) or not 2 <= len(ordered) <= 256:
        raise InputError(
            f"{file}: the label values are {str(list(ordered.values()))[:200]}; use 0 (background), 1, 2, ... without "
            "gaps, at most 255."
        )
    if next(iter(ordered)).lower() != "background":
        raise InputError(f'{file}: label 0 is called {next(iter(ordered))[:80]}; label 0 must be "background".')
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
        text = read_bounded(file, _LARGEST_TABLE).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a table of comma-separated values in UTF-8 ({error}); save it as one.") from None
    for number, row in enumerate(rows, start=2):
        case, patient = row.pop("case", None), row.pop("patient", None)
        if not case or not patient or None in row or None in row.values():
            problems.append(f"{file}: line {number} lacks a case, a patient or a column; fill in one value per column.")
        elif not all(value.isprintable() for value in (patient, *row.values())):
            problems.append(f"{file}: line {number} has a character that cannot be shown; write plain text.")
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
    if not re.fullmatch(r"[^./\\][^/\\]*", name) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        return [f"{folder / 'dataset.json'}: {name[:80]!r} cannot name a case; use letters, digits, - and _."]
    problems = []
    if len(images) not in (1, channels):
        problems.append(f"{folder / 'dataset.json'}: case {name} lists {len(images)} images for {channels} channels.")
    for path, what in [*((image, "image") for image in images), (label, "label map")]:
        file = folder / path
        if not lies_inside(folder, file):
            problems.append(f"{file}: lies outside {folder}; copy the file into the folder.")
        elif not file.is_file():
            problems.append(f"{file}: no such file, but it is the {what} of case {name}; add it or leave the case out.")
    return problems
