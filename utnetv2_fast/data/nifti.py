"""NIfTI files in and out: scans and labels in canonical orientation inside, on their own voxel grid outside."""

from __future__ import annotations

import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Extension
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from utnetv2_fast.errors import InputError
from utnetv2_fast.files import atomic_write

ENDINGS = (".nii.gz", ".nii")

# A header that claims more than this (as float32) is damaged, not large: 2048 x 2048 x 4096 voxels.
LARGEST_SCAN = 64 * 2**30
# No deflate stream expands further than 1032 : 1, so a smaller .gz cannot hold what its header promises.
_LARGEST_GZIP_RATIO = 1032
_LARGEST_HEADER = 540  # NIfTI-2; NIfTI-1 has 348 bytes
_LARGEST_OFFSET = 2**26  # of the voxels, after the extensions, among which may be a DICOM header
_LARGEST_SPACING = 100.0  # mm; a header in micrometres has more
_BYTES_AT_ONCE = 2**24
_COMMENT = 6  # the code of NIfTI's extension for plain text


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a file lie: shape (i, j, k) as stored, affine (4, 4) from voxel to world in mm (RAS+)."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    header: nib.Nifti1Header | None = None

    @cached_property
    def orientation(self) -> NDArray[np.float64]:
        """nibabel orientation (3, 2) that takes the stored axes to the closest canonical ones (RAS+)."""
        return np.asarray(orientations.io_orientation(self.affine))

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """(z, y, x)"""
        x, y, z = (self.shape[np.flatnonzero(self.orientation[:, 0] == axis)[0]] for axis in range(3))
        return z, y, x

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """(4, 4) from (x, y, z) of the canonical array to the world."""
        return np.asarray(self.affine @ orientations.inv_ornt_aff(self.orientation, self.shape))

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(z, y, x) of the canonical array, in mm, without the digits that are rounding of a turned float32 affine.

        They would decide where a resampled size lies halfway between two numbers of voxels.
        """
        x, y, z = (round(float(size), 5) for size in voxel_sizes(self.canonical_affine))
        return z, y, x


@dataclass(frozen=True, eq=False)
class Scan:
    """image (C, Z, Y, X) float32 in canonical orientation, and the grid of the files it came from."""

    image: NDArray[np.float32]
    grid: Grid


def file_stem(file: Path) -> str:
    """The file's name without `.nii.gz` or `.nii`."""
    return next((file.name.removesuffix(ending) for ending in ENDINGS if file.name.endswith(ending)), file.name)


def grid_difference(a: Grid, b: Grid) -> str | None:
    """In words, how two grids differ once both are canonical; None when they agree to a tenth of a voxel."""
    if a.canonical_shape != b.canonical_shape:
        return f"shape {_text(a.canonical_shape[::-1])} against {_text(b.canonical_shape[::-1])}"
    if not np.allclose(a.spacing, b.spacing, rtol=1e-3):
        return f"spacing {_text(a.spacing[::-1])} mm against {_text(b.spacing[::-1])} mm"
    z, y, x = a.canonical_shape
    corners = np.array([(*corner, 1) for corner in itertools.product((0, x - 1), (0, y - 1), (0, z - 1))])
    distance = np.linalg.norm(corners @ (a.canonical_affine - b.canonical_affine).T, axis=1).max()
    if distance > 0.1 * min(a.spacing):
        return f"position or direction in space, by up to {distance:.3g} mm"
    return None


def read_scan(files: Sequence[Path], channels: int | None = None) -> Scan:
    """Read one scan: one 3D file per channel, or, when `channels` is given, one 4D file with that many volumes.

    Raises InputError for a file that is unreadable, truncated, not NIfTI, not real-valued, of another dimension or
    without usable geometry, for values that are NaN or infinite, and for channels on different grids.
    """
    volumes, grids = zip(*(_read(file, np.float32) for file in files), strict=True)
    if len(files) == 1 and channels is not None and volumes[0].shape[0] == channels:
        image = volumes[0]
    else:
        for file, volume in zip(files, volumes, strict=True):
            _require_single_volume(file, volume)
        for file, grid in zip(files[1:], grids[1:], strict=True):
            if difference := grid_difference(grids[0], grid):
                raise InputError(
                    f"{file}: its grid differs from that of {files[0].name} ({difference}); resample the channels of "
                    "a scan to one grid."
                )
        image = volumes[0] if len(volumes) == 1 else np.concatenate(volumes)
    if channels is not None and len(image) != channels:
        raise InputError(f"{files[0]}: {len(image)} of {channels} channels are there; give one file per channel.")
    for file, channel in zip(files if len(files) == len(image) else itertools.repeat(files[0]), image, strict=False):
        if bad := channel.size - sum(np.count_nonzero(np.isfinite(plane)) for plane in channel):
            raise InputError(
                f"{file}: {bad} of {channel.size} voxels are NaN or infinite; replace them (for example with "
                "numpy.nan_to_num) or leave the scan out."
            )
    return Scan(image, grids[0])


def read_label(file: Path) -> tuple[NDArray[np.uint8], Grid]:
    """Read a label map (Z, Y, X) uint8 in canonical orientation, and its grid.

    Raises InputError as `read_scan` does, and for values that are not integers from 0 to 255.
    """
    volume, grid = _read(file, np.uint8)
    _require_single_volume(file, volume)
    return volume[0], grid


def read_remark(file: Path) -> str | None:
    """The remark that `write_label` left in the header of a file; None when there is none, or no such NIfTI file."""
    try:
        with _opened(file) as (header, _):
            texts = [extension.get_content() for extension in header.extensions if extension.get_code() == _COMMENT]
    except InputError:
        return None
    return next((text for text in map(_decoded, texts) if text), None)


def read_frames(file: Path, frames: Sequence[int] | None = None) -> tuple[NDArray[np.generic], Grid]:
    """All volumes of a file as stored, (i, j, k, T), in the type they are stored in or scaled to, and their grid.

    With `frames`, counted from 0, only those are kept in memory. Raises InputError as `read_scan` does, but looks at no
    value, and for a frame that the file does not have.
    """
    with _opened(file) as (header, stream):
        grid = _checked_grid(file, header)
        count = prod(header.get_data_shape()[3:])
        wanted = range(count) if frames is None else frames
        if max(wanted) >= count:
            raise InputError(
                f"{file}: has {count} frames, but frame {max(wanted)} (from 0) is wanted; download it again."
            )
        volumes: dict[int, NDArray[np.generic]] = {}
        for frame in range(count):
            chunks = [chunk for _, chunk in _chunks(stream, grid.shape, header.get_data_dtype())]
            if frame in wanted:
                scaling = header.get_slope_inter()
                volumes[frame] = np.concatenate([apply_read_scaling(chunk, *scaling) for chunk in chunks], axis=2)
        stream.read(1)
    return np.stack([volumes[frame] for frame in wanted], axis=-1), grid


def label_to_native(label: NDArray[np.uint8], grid: Grid) -> NDArray[np.uint8]:
    """A canonical label map (Z, Y, X) as stored: (i, j, k) in the grid's own orientation."""
    if label.shape != grid.canonical_shape:
        raise ValueError(f"label of shape {label.shape} on a grid of canonical shape {grid.canonical_shape}")
    return _to_stored(label.T, grid)


def write_label(file: Path, label: NDArray[np.uint8], grid: Grid, remark: str | None = None) -> None:
    """Write a canonical label map (Z, Y, X) as uint8 on the scan's own grid, with the geometry of its header.

    A `remark` becomes a comment in the header, in NIfTI's extension for text.
    """
    native = label_to_native(label.astype(np.uint8, casting="safe", copy=False), grid)
    if grid.header is None:
        image = nib.Nifti1Image(native, grid.affine)
    else:
        header = grid.header.copy()
        header.set_data_dtype(np.uint8)
        # The display window and the extensions (a DICOM header, say) describe the scan, not the label.
        header["cal_min"] = header["cal_max"] = 0
        header.extensions.clear()
        header["vox_offset"] = 0  # right behind the header, wherever the scan had its voxels
        kind: type[nib.Nifti1Image] = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        # A single slice stays as it was stored, (X, Y) or (X, Y, 1); of several volumes in a file one remains.
        shape = header.get_data_shape()
        image = kind(native.reshape(shape if prod(shape) == native.size else grid.shape), grid.affine, header)
    if remark is not None:
        image.header.extensions.append(Nifti1Extension(_COMMENT, remark.encode()))
    with atomic_write(file) as temporary:
        nib.save(image, temporary)


def scan_from_array(image: NDArray[np.generic], affine: NDArray[Any]) -> Scan:
    """A scan from an array (X, Y, Z) or (C, X, Y, Z) and its affine (4, 4), voxel to world in mm (RAS+).

    Raises InputError for another number of axes, an empty array, values that are not real or not finite, and a
    singular affine.
    """
    if image.ndim not in (3, 4) or image.size == 0:
        raise InputError(f"The image has shape {image.shape}; give (X, Y, Z) or (C, X, Y, Z) with at least one voxel.")
    if image.dtype.kind not in "biuf":
        raise InputError(f"The image holds {image.dtype} values; give real numbers.")
    affine = affine.astype(np.float64)
    if problem := affine_problem(affine):
        raise InputError(f"The affine {problem}; give the (4, 4) matrix from voxel to world in mm.")
    channels = image if image.ndim == 4 else image[None]
    grid = Grid(channels.shape[1:], affine)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(_to_canonical(np.moveaxis(channels, 0, -1), grid), dtype=np.float32)
    if not np.isfinite(values).all():
        raise InputError("The image holds NaN or infinite values; replace them (for example with numpy.nan_to_num).")
    return Scan(values, grid)


def blank(grid: Grid, volumes: int, dtype: type[np.float32] | type[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Memory for canonical volumes (T, Z, Y, X), and a view of it as it is stored: (T, i, j, k).

    What is filled slice by slice through the view is in memory once.
    """
    canonical = np.empty((volumes, *grid.canonical_shape), dtype=dtype)
    return canonical, np.moveaxis(_to_stored(canonical.T, grid), -1, 0)


def affine_problem(affine: NDArray[np.float64]) -> str | None:
    """What keeps a matrix from being the way from voxels to the world, or None."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return "is no finite (4, 4) matrix"
    # The volume of a voxel relative to that of a box with its edges: 1 without shear, 0 when two axes coincide.
    edges = prod(voxel_sizes(affine))
    return None if abs(np.linalg.det(affine[:3, :3])) > 1e-3 * edges else "is singular"


def _read(file: Path, dtype: type[np.float32] | type[np.uint8]) -> tuple[NDArray[Any], Grid]:
    """All volumes of a file, (T, Z, Y, X) in canonical orientation, and their grid.

    InputError when one of its values is no uint8 where that is asked for.
    """
    with _opened(file) as (header, stream):
        grid = _checked_grid(file, header)
        canonical, stored = blank(grid, prod(header.get_data_shape()[3:]), dtype)
        slope, intercept = header.get_slope_inter()
        for volume in stored:
            for first, chunk in _chunks(stream, grid.shape, header.get_data_dtype()):
                values = apply_read_scaling(chunk, slope, intercept)
                with np.errstate(over="ignore", invalid="ignore"):
                    converted = values.astype(dtype, copy=False)
                if dtype is np.uint8 and not np.array_equal(converted, values):
                    raise InputError(
                        f"{file}: a label map holds integers from 0 to 255, this one does not; export it again."
                    )
                volume[:, :, first : first + chunk.shape[2]] = converted
        _read_to_the_end(stream)
    return canonical, grid


def _checked_grid(file: Path, header: nib.Nifti1Header) -> Grid:
    """Where the voxels of a file lie; InputError when that cannot be."""
    i, j, k = (*header.get_data_shape(), 1)[:3]
    grid = Grid((i, j, k), header.get_best_affine().astype(np.float64), header)
    if problem := affine_problem(grid.affine):
        raise InputError(f"{file}: its affine {problem}; repair the geometry in its header.")
    if max(grid.spacing) > _LARGEST_SPACING:
        raise InputError(f"{file}: its spacing is {_text(grid.spacing[::-1])} mm; write the true one into it, in mm.")
    return grid


def _chunks(
    stream: BinaryIO, shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> Iterator[tuple[int, NDArray[np.generic]]]:
    """The index of its first slice and some slices (i, j, n) at a time, of one volume of `shape` (i, j, k)."""
    i, j, k = shape
    slices = max(1, _BYTES_AT_ONCE // (i * j * dtype.itemsize))
    for first in range(0, k, slices):
        count = i * j * min(slices, k - first)
        content = stream.read(count * dtype.itemsize)
        if len(content) < count * dtype.itemsize:
            raise EOFError(f"the voxels end in slice {first + len(content) // (i * j * dtype.itemsize)} of {k}")
        yield first, np.frombuffer(content, dtype).reshape((i, j, -1), order="F")


def _read_to_the_end(stream: BinaryIO) -> None:
    """Past the last voxel, because only at its end gzip compares its checksum; ValueError when that is far away."""
    surplus = 0
    while chunk := stream.read(_BYTES_AT_ONCE):
        surplus += len(chunk)
        if surplus > _LARGEST_OFFSET:
            raise ValueError("it goes on long after the last voxel")


@contextmanager
def _opened(file: Path) -> Iterator[tuple[nib.Nifti1Header, BinaryIO]]:
    """The header of a file, proved sane, and its bytes from the first voxel on; what goes wrong becomes InputError."""
    if not file.name.endswith(ENDINGS):
        raise InputError(f"{file}: only .nii and .nii.gz are read; convert the scan to NIfTI first.")
    try:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as stream:
            start = stream.read(_LARGEST_HEADER)
            kinds = (nib.Nifti1Header, nib.Nifti2Header)
            kind = next((kind for kind in kinds if kind.may_contain_header(start)), None)
            if kind is None:
                raise InputError(f"{file}: not a NIfTI file; convert the scan to NIfTI first.")
            # Unchecked at first: nibabel would mend what is to be refused.
            offset = _checked_offset(file, kind(start[: kind.sizeof_hdr], check=False))
            stream.seek(0)
            yield kind.from_fileobj(io.BytesIO(stream.read(offset))), cast(BinaryIO, stream)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; check the path.") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{file}: truncated or damaged ({error}); copy or download it again.") from error
    except (HeaderDataError, ImageFileError, KeyError, ValueError, OverflowError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not a readable NIfTI file ({reason}); copy or export it again.") from error


def _checked_offset(file: Path, header: nib.Nifti1Header) -> int:
    """Where the voxels begin, in bytes; InputError when the header promises what cannot be."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) < 2 or min(shape) < 1:
        raise InputError(f"{file}: its header claims the shape {_text(shape)}; copy or export it again.")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            f"{file}: holds {header.get_value_label('datatype')} values; export it as a scan of real numbers."
        )
    # Unused axes of a 2D file may have spacing 0. nibabel would silently make a zero 1 and a negative one positive.
    spacing = header["pixdim"][1 : 1 + min(len(shape), 3)]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputError(f"{file}: its header gives the spacing {_text(spacing)} mm; write the true one into it.")
    if prod(shape) * 4 > LARGEST_SCAN:
        raise InputError(
            f"{file}: its header claims the shape {_text(shape)}, too large for a scan; copy or export it again."
        )
    offset = int(header.get_data_offset())
    if not header.sizeof_hdr <= offset <= _LARGEST_OFFSET:
        raise HeaderDataError(f"its voxels would begin at byte {offset}")
    size = offset + prod(shape) * dtype.itemsize
    stored = file.stat().st_size
    if size > stored * (_LARGEST_GZIP_RATIO if file.name.endswith(".gz") else 1):
        raise EOFError(f"its header promises {size} bytes of content, the file has {stored}")
    return offset


def _require_single_volume(file: Path, volumes: NDArray[np.generic]) -> None:
    if len(volumes) != 1:
        raise InputError(f"{file}: holds {len(volumes)} volumes instead of one; split it into one file per channel.")


def _to_stored(volumes: NDArray[Any], grid: Grid) -> NDArray[Any]:
    """(X, Y, Z[, T]) in canonical orientation -> a view (i, j, k[, T]) in that of the file."""
    transform = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), grid.orientation)
    return np.asarray(orientations.apply_orientation(volumes, transform))


def _decoded(content: bytes | str) -> str:
    """An extension's text without the zeros that fill it up; empty when it is none."""
    return content if isinstance(content, str) else content.rstrip(b"\0").decode(errors="replace")


def _to_canonical(volumes: NDArray[np.generic], grid: Grid) -> NDArray[np.generic]:
    """(i, j, k, T) as stored -> (T, Z, Y, X)"""
    return np.asarray(orientations.apply_orientation(volumes, grid.orientation)).T


def _text(numbers: Sequence[float] | NDArray[np.generic]) -> str:
    return "(" + ", ".join(f"{float(number):.6g}" for number in numbers) + ")"
