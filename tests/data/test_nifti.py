"""Scans and labels are canonical inside, on their own grid outside, in any orientation; bad files are named."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utnetv2_fast.data.nifti import (
    Grid,
    grid_difference,
    label_to_native,
    read_frames,
    read_label,
    read_scan,
    scan_from_array,
    write_label,
)
from utnetv2_fast.errors import InputError

ORIENTATIONS = {
    "permutation": st.permutations(range(3)),
    "flips": st.tuples(*[st.sampled_from((1, -1))] * 3),
    "spacing": st.tuples(*[st.floats(0.3, 9.0)] * 3),
    "angles": st.tuples(*[st.floats(-0.2, 0.2)] * 3),
    "origin": st.tuples(*[st.floats(-300, 300)] * 3),
}
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(geometry=st.fixed_dictionaries(ORIENTATIONS), seed=st.integers(0, 99))
def test_label_round_trip_in_any_orientation_is_exact(
    geometry: dict, seed: int, tmp_path: Path, make_affine: Callable, write_nifti: Callable
) -> None:
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 5, rng.integers(1, 9, 3)).astype(np.uint8)
    file = write_nifti(tmp_path / "in.nii", stored, make_affine(**geometry))
    label, grid = read_label(file)
    # nibabel's own route to the canonical array is the oracle.
    canonical = nib.as_closest_canonical(nib.load(file))
    np.testing.assert_array_equal(label, np.asarray(canonical.dataobj).T)
    np.testing.assert_allclose(grid.canonical_affine, canonical.affine, atol=1e-3)
    np.testing.assert_allclose(grid.spacing, canonical.header.get_zooms()[::-1], rtol=1e-4)
    assert label.shape == grid.canonical_shape

    write_label(tmp_path / "out.nii.gz", label, grid)
    before, after = nib.load(file), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(after.dataobj), stored)
    np.testing.assert_array_equal(after.affine, before.affine)
    np.testing.assert_array_equal(label_to_native(label, grid), stored)


@FEW
@given(geometry=st.fixed_dictionaries(ORIENTATIONS), seed=st.integers(0, 99))
def test_a_voxel_keeps_its_place_in_the_world(geometry: dict, seed: int, make_affine: Callable) -> None:
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 9, 3)
    voxel = tuple(rng.integers(0, shape))
    image = np.zeros(shape)
    image[voxel] = 1
    affine = make_affine(**geometry)
    scan = scan_from_array(image, affine)
    z, y, x = np.argwhere(scan.image[0])[0]
    np.testing.assert_allclose(scan.grid.canonical_affine @ (x, y, z, 1), affine @ (*voxel, 1), atol=1e-9)
    assert (np.diag(scan.grid.canonical_affine)[:3] > 0).all()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "u2", "i4", "f4", ">f4", "f8"])
def test_stored_types(dtype: str, kind: type, ending: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 200, (5, 4, 3)).astype(dtype)
    header = kind.header_class(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    nib.save(kind(values, np.eye(4), header), tmp_path / f"scan{ending}")
    scan = read_scan([tmp_path / f"scan{ending}"])
    assert scan.image.dtype == np.float32
    assert scan.image.dtype.isnative
    np.testing.assert_array_equal(scan.image[0], values.T)
    np.testing.assert_array_equal(read_label(tmp_path / f"scan{ending}")[0], values.T)


def test_scaled_values(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(2.5, -7)
    nib.save(image, tmp_path / "scan.nii.gz")
    stored = nib.load(tmp_path / "scan.nii.gz")
    assert stored.dataobj.slope != 1
    np.testing.assert_array_equal(read_scan([tmp_path / "scan.nii.gz"]).image[0], stored.get_fdata().T.astype("f4"))


def test_slope_makes_no_label(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((2, 3, 4), np.int16), np.eye(4))
    nib.save(image, tmp_path / "label.nii")
    content = bytearray((tmp_path / "label.nii").read_bytes())
    content[112:120] = struct.pack("<ff", 0.5, 0)  # scl_slope, scl_inter
    (tmp_path / "label.nii").write_bytes(content)
    with pytest.raises(InputError, match=r"label\.nii: .*integers"):
        read_label(tmp_path / "label.nii")


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 1), (5, 4, 3, 1, 1), (1, 1, 1)])
def test_shapes_that_are_one_volume(shape: tuple[int, ...], tmp_path: Path, write_nifti: Callable) -> None:
    label = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    file = write_nifti(tmp_path / "label.nii.gz", label)
    read, grid = read_label(file)
    np.testing.assert_array_equal(read, label.reshape((*shape, 1)[:3]).T)
    write_label(tmp_path / "out.nii.gz", read, grid)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj), label)


def test_channels_are_stacked_in_order(tmp_path: Path, write_nifti: Callable) -> None:
    volumes = np.random.default_rng(0).random((5, 4, 3, 2)).astype(np.float32)
    files = [write_nifti(tmp_path / f"{c}.nii.gz", volumes[..., c]) for c in range(2)]
    np.testing.assert_array_equal(read_scan(files).image, volumes.T)
    together = write_nifti(tmp_path / "together.nii.gz", volumes)
    np.testing.assert_array_equal(read_scan([together], channels=2).image, volumes.T)
    for channels in (None, 1, 3):
        with pytest.raises(InputError, match=r"together\.nii\.gz: holds 2 volumes"):
            read_scan([together], channels)


def test_too_few_channels_are_refused(tmp_path: Path, write_nifti: Callable) -> None:
    file = write_nifti(tmp_path / "scan.nii.gz", np.ones((5, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"scan\.nii\.gz: 1 of 2 channels"):
        read_scan([file], channels=2)


def test_channels_on_different_grids_are_refused(tmp_path: Path, write_nifti: Callable) -> None:
    a = write_nifti(tmp_path / "a.nii.gz", np.ones((5, 4, 3), np.uint8))
    b = write_nifti(tmp_path / "b.nii.gz", np.ones((5, 4, 2), np.uint8))
    with pytest.raises(InputError, match=r"b\.nii\.gz.*a\.nii\.gz.*shape"):
        read_scan([a, b])


def test_header_of_the_scan_stays_with_the_label(tmp_path: Path, make_affine: Callable) -> None:
    image = nib.Nifti2Image(np.zeros((6, 5, 4), np.int16), make_affine((2, 0, 1), (1, -1, 1), angles=(0.1, 0.2, 0)))
    image.header.set_qform(make_affine((2, 0, 1), (1, -1, 1), angles=(0.1, 0.2, 0), origin=(7, 8, 9)), code=1)
    image.header.set_sform(image.affine, code=4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 4000
    image.header["descrip"] = b"scanner"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of the patient"))
    nib.save(image, tmp_path / "scan.nii.gz")
    grid = read_scan([tmp_path / "scan.nii.gz"]).grid
    write_label(tmp_path / "label.nii.gz", np.zeros(grid.canonical_shape, np.uint8), grid)
    label = nib.load(tmp_path / "label.nii.gz")
    assert isinstance(label, nib.Nifti2Image)
    assert label.get_data_dtype() == np.uint8
    for part in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "pixdim", "xyzt_units", "descrip"):
        np.testing.assert_array_equal(label.header[part], nib.load(tmp_path / "scan.nii.gz").header[part], part)
    assert label.header["cal_max"] == 0
    assert not label.header.extensions


def test_write_label_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid((3, 4, 5), np.eye(4))
    label = np.ones((5, 4, 3), np.uint8)
    write_label(tmp_path / "label.nii.gz", label, grid)

    def fail(image: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_label(tmp_path / "label.nii.gz", label * 0, grid)
    assert [file.name for file in tmp_path.iterdir()] == ["label.nii.gz"]
    np.testing.assert_array_equal(read_label(tmp_path / "label.nii.gz")[0], label)


def test_write_label_refuses_what_is_no_label(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_label(tmp_path / "label.nii", np.ones((5, 4, 3), np.int64), Grid((3, 4, 5), np.eye(4)))
    with pytest.raises(ValueError, match="shape"):
        write_label(tmp_path / "label.nii", np.ones((3, 4, 5), np.uint8), Grid((3, 4, 5), np.eye(4)))
    assert not list(tmp_path.iterdir())


def test_scan_from_array_is_the_scan_of_its_file(tmp_path: Path, make_affine: Callable, write_nifti: Callable) -> None:
    image = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    affine = make_affine((1, 2, 0), (-1, 1, -1), spacing=(1, 2, 3), angles=(0.1, 0, 0.1))
    read = read_scan([write_nifti(tmp_path / "scan.nii", image, affine)])
    made = scan_from_array(image, affine)
    np.testing.assert_array_equal(made.image, read.image)
    assert grid_difference(made.grid, read.grid) is None
    np.testing.assert_array_equal(scan_from_array(np.stack([image, image]), affine).image, np.repeat(read.image, 2, 0))


@pytest.mark.parametrize(
    ("image", "affine", "words"),
    [
        (np.zeros((3, 4)), np.eye(4), "shape"),
        (np.zeros((0, 3, 4)), np.eye(4), "shape"),
        (np.zeros((2, 3, 4)), np.zeros((4, 4)), "singular"),
        (np.zeros((2, 3, 4)), np.eye(3), r"\(4, 4\)"),
        (np.full((2, 3, 4), np.nan), np.eye(4), "NaN"),
        (np.full((2, 3, 4), 1e300), np.eye(4), "infinite"),
        (np.zeros((2, 3, 4), complex), np.eye(4), "complex"),
    ],
)
def test_scan_from_array_refuses(image: np.ndarray, affine: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        scan_from_array(image, affine)


def test_grid_difference_sees_places_not_storage(make_affine: Callable) -> None:
    base = Grid((4, 5, 6), make_affine(spacing=(1, 2, 3)))
    # The same voxels stored with x running the other way, and with the axes in another order.
    mirrored = base.affine @ nib.orientations.inv_ornt_aff([[0, -1], [1, 1], [2, 1]], (4, 5, 6))
    assert grid_difference(base, Grid((4, 5, 6), mirrored)) is None
    assert grid_difference(base, Grid((6, 4, 5), base.affine[:, [2, 0, 1, 3]])) is None
    assert grid_difference(base, Grid((4, 5, 6), base.affine + 1e-6)) is None
    shifted = base.affine.copy()
    shifted[0, 3] += 0.5
    assert "position" in str(grid_difference(base, Grid((4, 5, 6), shifted)))
    assert "direction" in str(
        grid_difference(base, Grid((4, 5, 6), make_affine(spacing=(1, 2, 3), angles=(0.2, 0, 0))))
    )
    assert "spacing" in str(grid_difference(base, Grid((4, 5, 6), make_affine(spacing=(1, 2, 3.1)))))
    assert "shape" in str(grid_difference(base, Grid((4, 5, 7), base.affine)))


# --- bad files -------------------------------------------------------------------------------------------------------


def scan_bytes(**fields: object) -> bytes:
    """A NIfTI-1 file of (8, 8, 8) int16 noise with header fields overwritten afterwards, unchecked."""
    noise = np.random.default_rng(0).integers(0, 1000, (8, 8, 8)).astype(np.int16)
    image = nib.Nifti1Image(noise, np.eye(4))
    image.header.set_qform(None, 0)
    content = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    return bytes(content)


def sform(*rows: tuple[float, float, float, float]) -> dict[str, object]:
    return {"sform_code": 1, **{f"srow_{axis}": row for axis, row in zip("xyz", rows, strict=True)}}


FLAT = sform((1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0))
BAD_HEADERS = {
    "zero spacing": ({"pixdim": [1, 0, 1, 1, 1, 1, 1, 1]}, "spacing"),
    "negative spacing": ({"pixdim": [1, 1, -2, 1, 1, 1, 1, 1]}, "spacing"),
    "NaN spacing": ({"pixdim": [1, 1, 1, np.nan, 1, 1, 1, 1]}, "spacing"),
    "flat affine": (FLAT, "singular"),
    "zero affine": (sform((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)), "singular"),
    "NaN affine": (sform((np.nan, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)), "finite"),
    "absurd shape": ({"dim": [3, 32000, 32000, 32000, 1, 1, 1, 1]}, "too large"),
    "more than is there": ({"dim": [3, 80, 80, 80, 1, 1, 1, 1]}, "truncated"),
    "negative shape": ({"dim": [3, 8, -8, 8, 1, 1, 1, 1]}, "shape"),
    "no axes": ({"dim": [0, 8, 8, 8, 1, 1, 1, 1]}, "shape"),
    "one axis": ({"dim": [1, 8, 8, 8, 1, 1, 1, 1]}, "shape"),
    "unknown type": ({"datatype": 77}, "readable"),
    "RGB": ({"datatype": 128, "bitpix": 24, "dim": [3, 4, 4, 4, 1, 1, 1, 1]}, "real numbers"),
    "complex": ({"datatype": 32, "bitpix": 64, "dim": [3, 4, 4, 4, 1, 1, 1, 1]}, "real numbers"),
    "4D": ({"dim": [4, 8, 8, 4, 2, 1, 1, 1]}, "2 volumes"),
    "offset into the header": ({"vox_offset": 12}, "readable"),
    "infinite offset": ({"vox_offset": np.inf}, "readable"),
    "infinite intercept": ({"scl_slope": 2, "scl_inter": np.inf}, "readable"),
}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused_in_one_sentence(name: str, ending: str, tmp_path: Path) -> None:
    fields, words = BAD_HEADERS[name]
    file = tmp_path / f"scan{ending}"
    content = scan_bytes(**fields)
    file.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    with pytest.raises(InputError, match=words) as caught:
        read_scan([file])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absurd_header_allocates_nothing(tmp_path: Path) -> None:
    for dim in ([3, 32000, 32000, 32000, 1, 1, 1, 1], [3, 2000, 2000, 2000, 1, 1, 1, 1]):
        (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(scan_bytes(dim=dim)))
        tracemalloc.start()
        with pytest.raises(InputError):
            read_scan([tmp_path / "scan.nii.gz"])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1e6


@pytest.mark.parametrize("kept", [0, 5, 200, 500, 900, -1])
def test_truncated_gzip(kept: int, tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(scan_bytes())[:kept])
    with pytest.raises(InputError, match=r"scan\.nii\.gz: (truncated|not a NIfTI)"):
        read_scan([tmp_path / "scan.nii.gz"])


@pytest.mark.parametrize("kept", [0, 347, 352, 1000, -1])
def test_truncated_plain(kept: int, tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(scan_bytes()[:kept])
    with pytest.raises(InputError, match=r"scan\.nii: "):
        read_scan([tmp_path / "scan.nii"])


def test_flipped_bit_in_gzip_is_found_by_its_checksum(tmp_path: Path) -> None:
    # Stored, not deflated, so that the flip alters a voxel and nothing else.
    content = bytearray(gzip.compress(scan_bytes(), compresslevel=0))
    content[700] ^= 1
    (tmp_path / "scan.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.nii\.gz: .*CRC"):
        read_scan([tmp_path / "scan.nii.gz"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite(value: float, tmp_path: Path, write_nifti: Callable) -> None:
    image = np.zeros((4, 4, 4))
    image[1, 2, 3] = value
    file = write_nifti(tmp_path / "scan.nii.gz", image)
    with pytest.raises(InputError, match=r"scan\.nii\.gz: 1 of 64 voxels"):
        read_scan([file])


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 256, 0.5, 1e10])
def test_values_that_are_no_labels(value: float, tmp_path: Path, write_nifti: Callable) -> None:
    label = np.zeros((4, 4, 4))
    label[1, 2, 3] = value
    file = write_nifti(tmp_path / "label.nii.gz", label)
    with pytest.raises(InputError, match=r"label\.nii\.gz: .*integers"):
        read_label(file)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text.nii").write_text("this is no scan " * 100)
    (tmp_path / "plain.nii.gz").write_bytes(scan_bytes())
    (tmp_path / "scan.mha").write_bytes(b"")
    (tmp_path / "folder.nii").mkdir()
    for name in ("text.nii", "plain.nii.gz", "scan.mha", "folder.nii", "absent.nii.gz"):
        with pytest.raises(InputError, match=name):
            read_scan([tmp_path / name])


@settings(max_examples=50)
@given(angles=st.tuples(*[st.floats(-0.6, 0.6)] * 3), spacing=st.tuples(*[st.sampled_from([0.9, 1.25, 1.5625, 8])] * 3))
def test_turning_a_scan_does_not_change_its_spacing(
    make_affine: Callable[..., np.ndarray], angles: tuple[float, ...], spacing: tuple[float, ...]
) -> None:
    turned = make_affine(spacing=spacing, angles=angles).astype(np.float32).astype(np.float64)
    assert sorted(Grid((4, 5, 6), turned).spacing) == sorted(spacing)


def test_frames_are_kept_as_stored_and_only_those_asked_for(
    tmp_path: Path, make_affine: Callable, write_nifti: Callable
) -> None:
    stored = np.random.default_rng(0).integers(-900, 900, (40, 50, 6, 30)).astype(np.int16)
    file = write_nifti(tmp_path / "cine.nii.gz", stored, make_affine((2, 0, 1), (1, -1, 1)))
    volumes, grid = read_frames(file)
    assert volumes.dtype == np.int16
    np.testing.assert_array_equal(volumes, stored)
    np.testing.assert_array_equal(grid.affine, nib.load(file).affine)
    tracemalloc.start()
    volumes, _ = read_frames(file, [29, 0, 29])
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(volumes, stored[..., [29, 0, 29]])
    assert largest < stored.nbytes / 3
    with pytest.raises(InputError, match=r"cine\.nii\.gz: has 30 frames, but frame 30"):
        read_frames(file, [0, 30])
