"""A DICOM series, a folder with one file per slice, as a scan. Needs pydicom, the extra `[dicom]`."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from utnetv2_fast.data.nifti import LARGEST_SCAN, Grid, Scan, affine_problem, blank
from utnetv2_fast.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

# Of the spacing: how far slices may lie from where they would be if they were evenly spaced.
_UNEVENNESS = 0.02
# What pydicom raises for values and elements that are not what the standard says.
_DAMAGE = (AttributeError, LookupError, TypeError, ValueError, EOFError, OverflowError, NotImplementedError)


def is_series(folder: Path) -> bool:
    """Whether a folder holds a DICOM file: one with its mark, or named .dcm."""
    return any(file.suffix.lower() == ".dcm" or _has_mark(file) for file in _files(folder))


def series_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, sorted by name."""
    return [file for file in _files(folder) if file.suffix.lower() == ".dcm" or _has_mark(file)]


def read_series(folder: Path) -> Scan:
    """Read the series in `folder`: its slices in the order of their places, rescaled to the units of the modality.

    The grid is that of a file with axes (column, row, slice) and an affine to RAS+, DICOM's own being LPS+.
    Raises InputError when pydicom is missing, for several series in one folder, slices of different sizes or
    orientations, two in one place, uneven spacing (one is missing, say), colour, more than one frame in a file, values
    that are not finite, and pixels that cannot be decompressed.
    """
    slices = _headers(folder)
    files, headers = list(slices), list(slices.values())
    first = headers[0]
    try:
        rows, columns = int(first.Rows), int(first.Columns)
        directions = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
        places = np.array([header.ImagePositionPatient for header in headers], dtype=np.float64).reshape(-1, 3)
        affine = _affine(folder, first, directions, places)
    except _DAMAGE as error:
        raise InputError(f"{files[0]}: lacks a usable geometry ({_reason(error)}); export the series again.") from None
    if not 0 < prod((rows, columns, len(files))) * 4 <= LARGEST_SCAN:
        raise InputError(f"{folder}: its headers claim {columns} x {rows} x {len(files)} voxels; export it again.")
    if problem := affine_problem(affine):
        raise InputError(f"{files[0]}: its affine {problem}; export the series again.")
    order = np.argsort(places @ np.cross(*directions))
    _pixels(files[order[0]], (rows, columns))  # before memory is taken for all: a header can claim anything
    grid = Grid((columns, rows, len(files)), affine)
    image, (stored,) = blank(grid, 1, np.float32)
    for index, number in enumerate(order.tolist()):
        stored[:, :, index] = _pixels(files[number], (rows, columns)).T
    return Scan(image, grid)


def _headers(folder: Path) -> dict[Path, Dataset]:
    """{file: its header without the pixels} of the images in a folder that holds one series."""
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError:
        raise InputError(f'{folder}: reading DICOM needs pydicom; pip install "utnetv2-fast[dicom]".') from None
    headers: dict[Path, Dataset] = {}
    kinds: dict[tuple[str, ...], Path] = {}
    for file in series_files(folder):
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            if "Rows" in header:
                headers[file] = header
                kinds.setdefault(_kind(header), file)
            elif not _is_no_image(header):
                raise ValueError("it ends in its header")
        except (InvalidDicomError, OSError, *_DAMAGE) as error:
            raise InputError(f"{file}: not a readable DICOM file ({_reason(error)}); export it again.") from None
    if not headers:
        raise InputError(f"{folder}: no DICOM image in it; give the folder that holds the files of a series.")
    series = Counter(str(header.get("SeriesInstanceUID", "unknown")) for header in headers.values())
    if len(series) > 1:
        described = {
            str(header.get("SeriesInstanceUID", "unknown")): str(
                header.get("SeriesDescription", "") or "no description"
            )
            for header in headers.values()
        }
        names = ", ".join(f"{described[uid]} ({count} files, {uid})" for uid, count in series.items())
        raise InputError(f"{folder}: holds {len(series)} series: {names}; put each into a folder of its own.")
    if len(kinds) > 1:
        one, other, *_ = kinds.values()
        raise InputError(
            f"{folder}: {one.name} and {other.name} differ in size, pixel spacing or orientation; keep the slices of "
            "one stack."
        )
    (frames, samples, *_), file = next(iter(kinds.items()))
    if frames != "1" or samples != "1":
        what = "several frames" if frames != "1" else "colours"
        raise InputError(f"{file}: holds {what} where one grey slice is read; convert the series to NIfTI first.")
    return headers


def _kind(header: Dataset) -> tuple[str, ...]:
    """What the slices of a stack have in common, as text: frames, samples, size, spacing, orientation."""
    orientation = np.round(np.array(header.get("ImageOrientationPatient") or [], dtype=np.float64), 4) + 0.0
    return (
        str(header.get("NumberOfFrames") or 1),
        str(header.get("SamplesPerPixel") or 1),
        *(str(header.get(name)) for name in ("Rows", "Columns", "PixelSpacing")),
        str(orientation.tolist()),
    )


def _is_no_image(header: Dataset) -> bool:
    """Whether this is the directory of a disc, a report and the like, by its class."""
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    return kind is not None and "Image" not in kind.name


def _affine(
    folder: Path, header: Dataset, directions: NDArray[np.float64], places: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(4, 4) from (column, row, slice) to the world in RAS+; InputError when the slices are not evenly spaced."""
    normal = np.cross(*directions)
    heights = np.sort(places @ normal)
    ordered = places[np.argsort(places @ normal)]
    if len(places) == 1:
        step = normal * float(header.get("SliceThickness") or 1.0)
    else:
        step = (ordered[-1] - ordered[0]) / (len(places) - 1)
        spacing = (heights[-1] - heights[0]) / (len(places) - 1)
        gaps = np.diff(heights)
        if gaps.min() <= _UNEVENNESS * spacing:
            raise InputError(f"{folder}: two slices lie in one place, at {heights[gaps.argmin()]:.6g} mm; keep one.")
        if np.abs(gaps - spacing).max() > _UNEVENNESS * spacing:
            raise InputError(
                f"{folder}: its slices are unevenly spaced, with gaps of {gaps.min():.6g} to {gaps.max():.6g} mm; add "
                "the missing ones, or resample the series."
            )
    row_spacing, column_spacing = (float(size) for size in header.PixelSpacing)
    affine = np.eye(4)
    # DICOM's first direction runs along a row, from column to column.
    affine[:3] = np.column_stack([directions[0] * column_spacing, directions[1] * row_spacing, step, ordered[0]])
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _pixels(file: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """One slice (rows, columns), in the units of its modality."""
    import pydicom

    slice_ = pydicom.dcmread(file)
    try:
        stored = slice_.pixel_array
    except (RuntimeError, *_DAMAGE) as error:
        syntax = getattr(getattr(slice_.file_meta, "TransferSyntaxUID", None), "name", "an unknown transfer syntax")
        raise InputError(
            f"{file}: its pixels cannot be read ({syntax}: {_reason(error)}); where they are compressed, pip install "
            "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or export the series uncompressed."
        ) from None
    if stored.shape != shape:
        raise InputError(f"{file}: holds pixels of shape {stored.shape}, its header says {shape}; export it again.")
    slope, intercept = slice_.get("RescaleSlope"), slice_.get("RescaleIntercept")
    values = stored.astype(np.float64) * float(1 if slope is None else slope) + float(intercept or 0)
    with np.errstate(over="ignore"):
        rescaled = values.astype(np.float32)
    if not np.isfinite(rescaled).all():
        raise InputError(f"{file}: holds NaN or infinite values; export the series again.")
    return rescaled


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _has_mark(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _reason(error: Exception) -> str:
    """The first sentence of what a library says, on one line."""
    return " ".join(str(error).split()).split(". ")[0][:200]
