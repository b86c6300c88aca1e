"""Public datasets in their own layouts, rewritten as nnU-Net raw folders with what is known of every case.

`layouts.py` finds the cases of a layout; here they are written, all of them or nothing.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from utnetv2_fast.data.dataset import Dataset, read_dataset
from utnetv2_fast.data.layouts import LAYOUTS, Contents, Layout, SourceCase, Volume
from utnetv2_fast.data.nifti import ENDINGS, Grid, read_frames
from utnetv2_fast.data.threads import map_in_threads
from utnetv2_fast.errors import InputError
from utnetv2_fast.progress import Track, silent


def convert(layout: Layout, source: Path, destination: Path, track: Track = silent) -> Dataset:
    """The dataset in `source` as an nnU-Net raw folder, with `cases.csv`: case, patient and what the source tells.

    Files are copied as they are, or, where `Contents.values` asks for it, written anew: one frame each, label maps with
    the values of this package and in the place of their scans. The destination appears when it is complete; one that
    holds this conversion already is left as it is. Raises InputError for another layout, files that cannot be read,
    and a destination with other content.
    """
    source, destination = Path(source), Path(destination)
    contents = LAYOUTS[layout](source, track)
    ending = _common_ending(source, contents)
    volumes = {f"imagesTr/{case.name}_0000{ending}": case.image for case in contents.cases}
    volumes |= {f"labelsTr/{case.name}{ending}": case.label for case in contents.cases}
    texts = {
        "dataset.json": json.dumps(
            {
                "name": contents.name,
                "channel_names": {"0": contents.channel},
                "labels": contents.labels,
                "numTraining": len(contents.cases),
                "file_ending": ending,
            },
            indent=2,
        ),
        "cases.csv": _case_table(contents),
    }
    copied = contents.values is None
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        if not _holds(destination, volumes, texts, compare_sizes=copied):
            raise InputError(f"{destination}: exists with other content; choose a new folder or remove it.")
        return read_dataset(destination)

    with _new_folder(destination) as temporary:
        for sub in ("imagesTr", "labelsTr"):
            (temporary / sub).mkdir()
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")

        def copy(name: str) -> None:
            shutil.copyfile(volumes[name].file, temporary / name)

        def write_anew(cases: Sequence[SourceCase]) -> None:
            _write_anew(cases, contents.values or {}, temporary)

        if copied:
            map_in_threads(copy, list(volumes), track, "Converting")
        else:
            map_in_threads(write_anew, _by_files(contents.cases), track, "Converting")
    return read_dataset(destination)


def _common_ending(source: Path, contents: Contents) -> str:
    """The one ending of all files that are copied; what is written anew is compressed."""
    if contents.values is not None:
        return ".nii.gz"
    files = [volume.file for case in contents.cases for volume in (case.image, case.label)]
    endings = {next(ending for ending in ENDINGS if file.name.endswith(ending)) for file in files}
    if len(endings) > 1:
        raise InputError(f"{source}: holds .nii and .nii.gz files; compress all of them, or none.")
    return endings.pop()


def _case_table(contents: Contents) -> str:
    """`cases.csv`; a column that a case does not have stays empty."""
    columns = list(dict.fromkeys(column for case in contents.cases for column in case.metadata))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", "patient", *columns])
    for case in contents.cases:
        table.writerow([case.name, case.patient, *(case.metadata.get(column, "") for column in columns)])
    return text.getvalue()


def _by_files(cases: Sequence[SourceCase]) -> list[list[SourceCase]]:
    """Those that are frames of the same files, together."""
    groups: dict[tuple[Path, Path], list[SourceCase]] = {}
    for case in cases:
        groups.setdefault((case.image.file, case.label.file), []).append(case)
    return list(groups.values())


def _write_anew(cases: Sequence[SourceCase], values: dict[int, int], folder: Path) -> None:
    """Cases of the same two files, each of which is read once: a cine file is long, and compressed as a whole."""
    images, grid = _frames([case.image for case in cases])
    labels, _ = _frames([case.label for case in cases])
    for index, case in enumerate(cases):
        label = _relabelled(case.label, labels[..., index], values)
        _save(folder / f"imagesTr/{case.name}_0000.nii.gz", images[..., index], grid.affine)
        # Whatever its header says: the sources number the voxels of both alike.
        _save(folder / f"labelsTr/{case.name}.nii.gz", label, grid.affine)


def _frames(volumes: Sequence[Volume]) -> tuple[NDArray[np.generic], Grid]:
    """Volumes of one file as they are stored, (i, j, k, n), and their grid."""
    file, frames = volumes[0].file, [volume.frame for volume in volumes if volume.frame is not None]
    stored, grid = read_frames(file, frames or None)
    if not frames and stored.shape[3] != 1:
        raise InputError(f"{file}: holds {stored.shape[3]} volumes instead of one; check the layout that you named.")
    return stored, grid


def _relabelled(volume: Volume, label: NDArray[np.generic], values: dict[int, int]) -> NDArray[np.uint8]:
    """`label` with the package's values in the place of the source's; InputError for one that is not known."""
    result = np.zeros(label.shape, np.uint8)
    known = label == 0
    for old, new in values.items():
        result[label == old] = new
        known |= label == old
    if not known.all():
        raise InputError(
            f"{volume.file}: holds the label {label[~known][0]}, this layout has {', '.join(map(str, values))}; check "
            "the layout that you named."
        )
    return result


def _save(file: Path, array: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    stored = array.astype(np.float32) if array.dtype == np.float64 else array
    nib.save(nib.Nifti1Image(stored, affine, dtype=stored.dtype), file)


def _holds(folder: Path, volumes: dict[str, Volume], texts: dict[str, str], *, compare_sizes: bool) -> bool:
    """Whether `folder` has these texts, and these files, of the sizes of those they were copied from."""
    return all(
        (folder / name).is_file() and (folder / name).read_bytes() == text.encode() for name, text in texts.items()
    ) and all(
        (folder / name).is_file()
        and (not compare_sizes or (folder / name).stat().st_size == volume.file.stat().st_size)
        for name, volume in volumes.items()
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
