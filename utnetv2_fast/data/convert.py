"""Public datasets in their own layouts, rewritten as nnU-Net raw folders with the patients of their cases."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utnetv2_fast.data.dataset import Dataset, read_dataset
from utnetv2_fast.data.nifti import file_stem, read_scan
from utnetv2_fast.data.threads import map_in_threads
from utnetv2_fast.data.verify import scan_digest
from utnetv2_fast.errors import InputError
from utnetv2_fast.progress import Track, silent

_ACDC_LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}


@dataclass(frozen=True)
class _Frame:
    image: Path
    label: Path
    patient: str
    group: str
    phase: str  # ED or ES

    @property
    def name(self) -> str:
        return file_stem(self.image)


def convert_acdc(source: Path, destination: Path, track: Track = silent) -> Dataset:
    """The ACDC challenge's training set as an nnU-Net raw folder, with `cases.csv`: case, patient, group, phase.

    `source` holds `patientNNN/Info.cfg`, `patientNNN_frameFF.nii.gz` and `patientNNN_frameFF_gt.nii.gz`, or a folder
    `training` that does. Patients with identical scans (074 and 076: one scan, annotated twice) count as one patient,
    so that no fold has one scan on both sides. The destination appears when it is complete; one that holds this
    conversion already is left as it is. Raises InputError for another layout, unreadable scans, and a destination
    with other content.
    """
    source, destination = Path(source), Path(destination)
    folder = source / "training" if (source / "training").is_dir() else source
    patients = sorted(path for path in folder.glob("patient*") if path.is_dir())
    if not patients:
        raise InputError(f"{source}: no folder patientNNN in it; give the unpacked training set of the ACDC challenge.")
    frames = [frame for patient in patients for frame in _acdc_frames(patient)]
    people = _same_people(frames, track)
    copies = {f"imagesTr/{frame.name}_0000.nii.gz": frame.image for frame in frames}
    copies |= {f"labelsTr/{frame.name}.nii.gz": frame.label for frame in frames}
    texts = {
        "dataset.json": json.dumps(
            {
                "name": "ACDC",
                "channel_names": {"0": "cine MRI"},
                "labels": _ACDC_LABELS,
                "numTraining": len(frames),
                "file_ending": ".nii.gz",
            },
            indent=2,
        ),
        "cases.csv": _table(
            [("case", "patient", "group", "phase"), *((f.name, people[f.patient], f.group, f.phase) for f in frames)]
        ),
    }
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        if not _holds(destination, copies, texts):
            raise InputError(f"{destination}: exists with other content; choose a new folder or remove it.")
        return read_dataset(destination)
    with _new_folder(destination) as temporary:
        for sub in ("imagesTr", "labelsTr"):
            (temporary / sub).mkdir()
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, file in track(list(copies.items()), "Converting"):
            shutil.copyfile(file, temporary / name)
    return read_dataset(destination)


def _acdc_frames(patient: Path) -> Iterator[_Frame]:
    """End-diastole and end-systole, as Info.cfg names them."""
    info_file = patient / "Info.cfg"
    if not info_file.is_file():
        raise InputError(f"{info_file}: no such file; give the unpacked training set of the ACDC challenge.")
    lines = info_file.read_text(encoding="utf-8", errors="replace").splitlines()
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    for phase in ("ED", "ES"):
        if not info.get(phase, "").isdecimal() or not info.get("Group"):
            raise InputError(f"{info_file}: lacks {phase} (a frame number) or Group; copy or download it again.")
        stem = patient / f"{patient.name}_frame{int(info[phase]):02d}"
        frame = _Frame(
            Path(f"{stem}.nii.gz"), Path(f"{stem}_gt.nii.gz"), patient.name, group=info["Group"], phase=phase
        )
        for file in (frame.image, frame.label):
            if not file.is_file():
                raise InputError(f"{file}: no such file, but {info_file} names its frame; download the patient again.")
        yield frame


def _same_people(frames: Sequence[_Frame], track: Track) -> dict[str, str]:
    """{patient: the first patient with the same scan, or itself}"""
    digests = map_in_threads(lambda frame: scan_digest(read_scan([frame.image])), frames, track, "Reading")
    owners: dict[bytes, str] = {}
    people: dict[str, str] = {}
    for frame, digest in zip(frames, digests, strict=True):
        owner = owners.setdefault(digest, frame.patient)
        if people.get(frame.patient, frame.patient) == frame.patient:
            people[frame.patient] = people.get(owner, owner)
    return people


def _table(rows: list[tuple[str, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _holds(folder: Path, copies: dict[str, Path], texts: dict[str, str]) -> bool:
    """Whether `folder` has these texts and files of these sizes."""
    return all(
        (folder / name).is_file() and (folder / name).read_bytes() == text.encode() for name, text in texts.items()
    ) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == file.stat().st_size
        for name, file in copies.items()
    )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success it becomes `folder`, on any error it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as outer:
        inner = Path(outer) / folder.name  # made by mkdir, so with the permissions that the user's umask gives
        inner.mkdir()
        yield inner
        if folder.exists():
            folder.rmdir()  # empty
        os.replace(inner, folder)
