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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from utnetv2_fast.data.dataset import Dataset, read_dataset
from utnetv2_fast.data.layouts import LAYOUTS, Contents, Layout, Volume
from utnetv2_fast.data.nifti import ENDINGS, read_frames
from utnetv2_fast.data.threads import map_in_threads
from utnetv2_fast.errors import InputError
from utnetv2_fast.progress import Track, silent


def convert(layout: Layout, source: Path, destination: Path, track: Track = silent) -> Dataset:
    """The dataset in `source` as an nnU-Net raw folder, with `cases.csv`: case, patient and what the source tells.

    Files are copied as they are, or, where `Contents.values` asks for it, written anew: one frame each, labels with
    the values of this package, the spacing as the only geometry. The destination appears when it is complete; one that
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

        def write(name: str) -> None:
            if contents.values is None:
                shutil.copyfile(volumes[name].file, temporary / name)
            elif name.startswith("labelsTr"):
                label, spacing = _frame(volumes[name])
                _save(temporary / name, _relabelled(volumes[name], label, contents.values), spacing)
            else:
                _save(temporary / name, *_frame(volumes[name]))

        map_in_threads(write, list(volumes), track, "Converting")
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


def _frame(volume: Volume) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """One volume (i, j, k) as it is stored, and the spacing of its axes in mm."""
    frames, grid = read_frames(volume.file)
    count = frames.shape[3]
    if volume.frame is None and count != 1:
        raise InputError(f"{volume.file}: holds {count} volumes instead of one; check the layout that you named.")
    if volume.frame is not None and volume.frame >= count:
        raise InputError(
            f"{volume.file}: has {count} frames, but frame {volume.frame} (from 0) is wanted; download it again."
        )
    return frames[..., volume.frame or 0], np.asarray(voxel_sizes(grid.affine))


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


def _save(file: Path, array: NDArray[np.generic], spacing: NDArray[np.float64]) -> None:
    stored = array.astype(np.float32) if array.dtype == np.float64 else array
    nib.save(nib.Nifti1Image(stored, np.diag([*spacing, 1.0]), dtype=stored.dtype), file)


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
