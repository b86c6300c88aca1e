"""Where public datasets keep their scans, label maps and what is known of them: one function per layout.

All cardiac sets are given ACDC's labels, RV 1, MYO 2, LV 3, and the columns `phase` (ED or ES) and `vendor`, so that
they can be merged into one dataset and their scores split by domain. What is written anew keeps its place in space:
short-axis slices lie at any angle, and every scan is prepared, and predicted, along axes of its own (`Plan.axes_of`).

The layouts are what the datasets' own pages and public code describe; of the downloads themselves only ACDC's was seen.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from utnetv2_fast.data.dataset import read_dataset
from utnetv2_fast.data.nifti import file_stem, read_frames, read_scan
from utnetv2_fast.data.threads import map_in_threads
from utnetv2_fast.data.verify import scan_digest
from utnetv2_fast.errors import InputError
from utnetv2_fast.progress import Track

Layout = Literal["acdc", "mnms", "mnms2", "ukbb", "bcv", "lits", "merge"]

CARDIAC_LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
_CINE = "cine MRI"
# M&Ms, M&Ms-2 and the UK Biobank count LV 1, MYO 2, RV 3.
_FROM_LV_FIRST = {1: 3, 2: 2, 3: 1}

_ABDOMINAL_ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)


@dataclass(frozen=True)
class Volume:
    """A 3D file, or one frame of a 4D one, counted from 0."""

    file: Path
    frame: int | None = None


@dataclass(frozen=True)
class SourceCase:
    """One labelled scan of a source, and what its source tells of it: the further columns of `cases.csv`."""

    name: str
    patient: str
    image: Volume
    label: Volume
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Contents:
    """What a source holds. `values` leads from its label values to those of `labels`; None: files stay as they are."""

    name: str
    channel: str
    labels: dict[str, int]
    cases: tuple[SourceCase, ...]
    values: dict[int, int] | None = None


def read_acdc(source: Path, track: Track) -> Contents:
    """The ACDC challenge: `patientNNN/Info.cfg`, `patientNNN_frameFF.nii.gz` and `patientNNN_frameFF_gt.nii.gz`.

    `source` is the folder `training` or `testing` of the download, or one that holds `training`: the challenge's test
    patients become a dataset of their own. Patients with identical scans (074 and 076: one scan, annotated twice) count
    as one patient, so that no fold has one scan on both sides. Columns: group, phase, subset, and the one vendor and
    centre of the challenge.
    """
    folder = source / "training" if (source / "training").is_dir() else source
    patients = sorted(path for path in folder.glob("patient*") if path.is_dir())
    if not patients:
        raise InputError(f"{source}: no folder patientNNN in it; give the unpacked training set of the ACDC challenge.")
    subset = "testing" if folder.name == "testing" else "training"
    cases = [case for patient in patients for case in _acdc_frames(patient, subset)]
    people = _same_people(cases, track)
    return Contents(
        "ACDC",
        _CINE,
        CARDIAC_LABELS,
        tuple(SourceCase(case.name, people[case.patient], case.image, case.label, case.metadata) for case in cases),
    )


def _acdc_frames(patient: Path, subset: str) -> Iterator[SourceCase]:
    """End-diastole and end-systole, as Info.cfg names them; the frames of the test set need not have a group."""
    info_file = patient / "Info.cfg"
    if not info_file.is_file():
        raise InputError(f"{info_file}: no such file; give the unpacked training set of the ACDC challenge.")
    lines = info_file.read_text(encoding="utf-8", errors="replace").splitlines()
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    for phase in ("ED", "ES"):
        if not info.get(phase, "").isdecimal() or not (info.get("Group") or subset == "testing"):
            raise InputError(f"{info_file}: lacks {phase} (a frame number) or Group; copy or download it again.")
        stem = f"{patient.name}_frame{int(info[phase]):02d}"
        image, label = patient / f"{stem}.nii.gz", patient / f"{stem}_gt.nii.gz"
        for file in (image, label):
            if not file.is_file():
                raise InputError(f"{file}: no such file, but {info_file} names its frame; download the patient again.")
        metadata = {"group": info.get("Group", ""), "phase": phase, "subset": subset}
        yield SourceCase(
            stem, patient.name, Volume(image), Volume(label), metadata | {"vendor": "Siemens", "centre": "Dijon"}
        )


def _same_people(cases: Sequence[SourceCase], track: Track) -> dict[str, str]:
    """{patient: the first patient with the same scan, or itself}"""
    digests = map_in_threads(lambda case: scan_digest(read_scan([case.image.file])), cases, track, "Reading")
    owners: dict[bytes, str] = {}
    people: dict[str, str] = {}
    for case, digest in zip(cases, digests, strict=True):
        owner = owners.setdefault(digest, case.patient)
        if people.get(case.patient, case.patient) == case.patient:
            people[case.patient] = people.get(owner, owner)
    return people


def read_mnms(source: Path, track: Track) -> Contents:
    """The M&Ms challenge's OpenDataset: `CODE/CODE_sa.nii.gz` and `CODE_sa_gt.nii.gz`, 4D, and one CSV.

    The subjects may lie at any depth; a folder `Training`, `Validation` or `Testing` above them names their subset, and
    those without a label map are left out. The CSV in `source` has the columns External code, VendorName, Centre, ED
    and ES, the frames counted from 0, and Pathology. Only the two labelled frames become cases. Columns: phase, subset,
    vendor, centre, pathology.
    """
    rows = _information(source, "External code", ("VendorName", "Centre", "ED", "ES"))
    cases = []
    for label in _files(source, "*_sa_gt.nii.gz"):
        code = label.name.removesuffix("_sa_gt.nii.gz")
        image = label.with_name(f"{code}_sa.nii.gz")
        _require(image, "the scan of", label)
        if code not in rows:
            raise InputError(f"{label}: no line of the information CSV in {source} has this code; download it again.")
        row = rows[code]
        metadata = {
            "subset": next((p for p in map(str.lower, label.parts) if p in ("training", "validation", "testing")), ""),
            "vendor": _vendor(row["VendorName"]),
            "centre": row["Centre"],
            "pathology": row.get("Pathology") or "",
        }
        for phase in ("ED", "ES"):
            if not (row[phase] or "").isdecimal():
                raise InputError(f"{source}: the line of {code} in the information CSV lacks {phase}, a frame number.")
            frame = int(row[phase])
            cases.append(
                SourceCase(
                    f"{code}_{phase}", code, Volume(image, frame), Volume(label, frame), {"phase": phase} | metadata
                )
            )
    return Contents("MnMs", _CINE, CARDIAC_LABELS, _found(source, cases, "CODE/CODE_sa_gt.nii.gz"), _FROM_LV_FIRST)


def read_mnms2(source: Path, track: Track) -> Contents:
    """The M&Ms-2 challenge: `dataset_information.csv` and `SUBJECT/SUBJECT_SA_ED.nii.gz`, `..._SA_ED_gt.nii.gz`, ES.

    Long-axis views are left out. The CSV has the columns SUBJECT_CODE, VENDOR and DISEASE, perhaps SCANNER and FIELD.
    Subjects 1 to 160 are the challenge's training set, those to 200 its validation set, the others its test set.
    Columns: phase, subset, vendor, pathology, scanner, field.
    """
    information = _information(source, "SUBJECT_CODE", ("VENDOR", "DISEASE"))
    rows = {_number(code): row for code, row in information.items()}
    cases = []
    for label in _files(source, "*_SA_E[DS]_gt.nii.gz"):
        stem = label.name.removesuffix("_gt.nii.gz")
        code, phase = stem.removesuffix("_SA_ED").removesuffix("_SA_ES"), stem[-2:]
        image = label.with_name(f"{stem}.nii.gz")
        _require(image, "the scan of", label)
        number = _number(code)
        if number is None or number not in rows:
            raise InputError(f"{label}: dataset_information.csv has no line for subject {code}; download it again.")
        row = rows[number]
        metadata = {
            "phase": phase,
            "subset": "training" if number <= 160 else "validation" if number <= 200 else "testing",
            "vendor": _vendor(row["VENDOR"]),
            "pathology": row["DISEASE"],
            "scanner": row.get("SCANNER") or "",
            "field": row.get("FIELD") or "",
        }
        cases.append(SourceCase(f"{code}_{phase}", code, Volume(image), Volume(label), metadata))
    found = _found(source, cases, "SUBJECT/SUBJECT_SA_ED_gt.nii.gz")
    return Contents("MnMs2", _CINE, CARDIAC_LABELS, found, _FROM_LV_FIRST)


def read_ukbb(source: Path, track: Track) -> Contents:
    """Short-axis scans of the UK Biobank in the layout of Bai's ukbb_cardiac: one folder per subject, any name.

    It holds `sa_ED.nii.gz`, `sa_ES.nii.gz` and their `label_sa_ED.nii.gz`, `label_sa_ES.nii.gz`, or else the whole
    cycle, `sa.nii.gz`, with `label_sa.nii.gz`, 4D. Of the latter, the first frame with labels is ED and the one with
    the smallest LV among the others ES. Subjects without any label map are left out. Columns: phase, and the one vendor
    of the Biobank.
    """
    folders = sorted({file.parent for file in _files(source, "label_sa*.nii.gz")})
    found = map_in_threads(_ukbb_subject, folders, track, "Reading")
    cases = _found(source, [case for cases in found for case in cases], "SUBJECT/label_sa_ED.nii.gz")
    return Contents("UKBB", _CINE, CARDIAC_LABELS, cases, _FROM_LV_FIRST)


def _ukbb_subject(folder: Path) -> list[SourceCase]:
    if (folder / "label_sa_ED.nii.gz").is_file() or (folder / "label_sa_ES.nii.gz").is_file():
        volumes = {
            phase: (Volume(folder / f"sa_{phase}.nii.gz"), Volume(folder / f"label_sa_{phase}.nii.gz"))
            for phase in ("ED", "ES")
        }
    elif (label := folder / "label_sa.nii.gz").is_file():
        frames = _labelled_frames(label)
        volumes = {
            phase: (Volume(folder / "sa.nii.gz", frame), Volume(label, frame))
            for phase, frame in zip(("ED", "ES"), frames, strict=True)
        }
    else:
        return []
    for pair in volumes.values():
        for volume in pair:
            _require(volume.file, "needed beside the label maps of", folder)
    metadata = {"vendor": "Siemens"}
    return [
        SourceCase(f"{folder.name}_{phase}", folder.name, image, label, {"phase": phase} | metadata)
        for phase, (image, label) in volumes.items()
    ]


def _labelled_frames(file: Path) -> tuple[int, int]:
    """End-diastole and end-systole of a labelled cycle."""
    frames, _ = read_frames(file)
    labelled = np.flatnonzero(frames.any(axis=(0, 1, 2)))
    if len(labelled) < 2:
        raise InputError(f"{file}: {len(labelled)} of its frames have labels, ED and ES are needed; leave it out.")
    lv = [np.count_nonzero(frames[..., frame] == 1) for frame in labelled[1:]]
    return int(labelled[0]), int(labelled[1 + int(np.argmin(lv))])


def read_bcv(source: Path, track: Track) -> Contents:
    """Beyond the Cranial Vault (Synapse), abdomen: `img/img0001.nii.gz` and `label/label0001.nii.gz`, 13 organs.

    `source` is `RawData/Training` of the download, or any folder above it.
    """
    labels = {"background": 0} | {organ: value for value, organ in enumerate(_ABDOMINAL_ORGANS, start=1)}
    cases = []
    for label in _files(source, "label[0-9]*.nii.gz"):
        number = file_stem(label).removeprefix("label")
        image = label.parent.parent / "img" / f"img{number}.nii.gz"
        _require(image, "the scan of", label)
        cases.append(SourceCase(f"img{number}", f"img{number}", Volume(image), Volume(label)))
    return Contents("BCV", "CT", labels, _found(source, cases, "label/labelXXXX.nii.gz"))


def read_lits(source: Path, track: Track) -> Contents:
    """The LiTS challenge: `volume-N.nii` and `segmentation-N.nii` (or .nii.gz), side by side in one or more folders."""
    cases = []
    for label in _files(source, "segmentation-*.nii*"):
        if not re.fullmatch(r"segmentation-\d+", file_stem(label)):
            continue
        image = label.with_name(label.name.replace("segmentation", "volume"))
        _require(image, "the scan of", label)
        cases.append(SourceCase(file_stem(image), file_stem(image), Volume(image), Volume(label)))
    labels = {"background": 0, "liver": 1, "tumour": 2}
    return Contents("LiTS", "CT", labels, _found(source, cases, "segmentation-N.nii"))


def read_merge(source: Path, track: Track) -> Contents:
    """Every dataset in a folder of `source` as one, as far as they have the same labels and channels.

    Cases and patients get the name of their dataset in front, and `cases.csv` the column dataset.
    """
    datasets = [read_dataset(file.parent) for file in sorted(source.glob("*/dataset.json"))]
    if not datasets:
        raise InputError(f"{source}: no dataset in the folders in it; give a folder of converted datasets.")
    first, cases = datasets[0], []
    for dataset in datasets:
        if (dataset.labels, dataset.channels) != (first.labels, first.channels) or len(dataset.channels) > 1:
            raise InputError(
                f"{dataset.folder}: its labels or channels are not those of {first.folder}, or more than one channel; "
                "only datasets of the same classes and of one channel are merged."
            )
        for case in dataset.cases:
            if case.label is not None:
                metadata = {"dataset": dataset.name} | dict(case.metadata)
                name, patient = (f"{dataset.name}_{own}" for own in (case.name, case.patient))
                cases.append(SourceCase(name, patient, Volume(case.images[0]), Volume(case.label), metadata))
    if len({dataset.name for dataset in datasets}) < len(datasets):
        raise InputError(f"{source}: two of its datasets have one name; give each its own in dataset.json.")
    return Contents(source.resolve().name, first.channels[0], first.labels, tuple(cases))


LAYOUTS: dict[Layout, Callable[[Path, Track], Contents]] = {
    "acdc": read_acdc,
    "mnms": read_mnms,
    "mnms2": read_mnms2,
    "ukbb": read_ukbb,
    "bcv": read_bcv,
    "lits": read_lits,
    "merge": read_merge,
}


def _files(source: Path, pattern: str) -> list[Path]:
    """Sorted, at any depth; without hidden files, such as the `._` companions that macOS writes."""
    return sorted(file for file in source.rglob(pattern) if not file.name.startswith("."))


def _found(source: Path, cases: Sequence[SourceCase], what: str) -> tuple[SourceCase, ...]:
    """`cases`; InputError when there are none, or two of one name."""
    if not cases:
        raise InputError(f"{source}: no {what} in it; give the dataset as it was downloaded and unpacked.")
    names: dict[str, SourceCase] = {}
    for case in cases:
        if names.setdefault(case.name, case) is not case:
            raise InputError(
                f"{case.label.file}: {names[case.name].label.file} is a label map of the same case; keep one of them."
            )
    return tuple(cases)


def _require(file: Path, what: str, of: Path) -> None:
    if not file.is_file():
        raise InputError(f"{file}: no such file, but it is {what} {of}; download it again.")


def _information(source: Path, key: str, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """{value of the column `key`: the row} of the CSV in `source` that has all these columns."""
    for file in sorted(source.glob("*.csv")):
        try:
            with file.open(newline="", encoding="utf-8-sig") as stream:
                rows = list(csv.DictReader(stream, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not a table in UTF-8 ({error}); download it again.") from None
        if rows and {key, *columns} <= rows[0].keys():
            if any(None in row or None in row.values() for row in rows):
                raise InputError(f"{file}: a line has more or fewer values than there are columns; download it again.")
            return {row[key]: row for row in rows}
    raise InputError(f"{source}: no CSV with the columns {', '.join((key, *columns))} in it; download it again.")


def _vendor(name: str) -> str:
    """One spelling of each vendor, whatever follows its name."""
    words = {"siemens": "Siemens", "philips": "Philips", "ge": "GE", "general": "GE", "canon": "Canon"}
    return words.get(name.strip().lower().split(" ")[0], name.strip())


def _number(code: str) -> int | None:
    return int(code) if code.isdecimal() else None
