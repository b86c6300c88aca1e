"""A DICOM series becomes the scan that its NIfTI conversion would be; what cannot be one is refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from utnetv2_fast.data.dataset import list_scans
from utnetv2_fast.data.dicom import is_series, read_series
from utnetv2_fast.data.nifti import scan_from_array
from utnetv2_fast.errors import InputError

pydicom = pytest.importorskip("pydicom")

SERIES = "1.2.826.0.1.3680043.8.498.1"
# First along a row, then down a column: an oblique plane, in LPS+.
DIRECTIONS = np.array([[0.8, 0.6, 0.0], [-0.48, 0.64, 0.6]])
NORMAL = np.cross(*DIRECTIONS)
ORIGIN = np.array([-31.5, 12.25, 7.0])
SPACING = (0.7, 0.9)  # between rows, between columns
STEP = 2.5


def write_slice(file: Path, pixels: np.ndarray, place: np.ndarray, **elements: object) -> None:
    """One slice (rows, columns) int16 at `place`; `elements` change or (None) remove what it says of itself."""
    slice_ = pydicom.Dataset()
    slice_.file_meta = pydicom.dataset.FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    slice_.file_meta.MediaStorageSOPClassUID = slice_.SOPClassUID = pydicom.uid.CTImageStorage
    slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID = pydicom.uid.generate_uid()
    values = {
        "SeriesInstanceUID": SERIES,
        "SeriesDescription": "thorax",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "PixelSpacing": list(SPACING),
        "ImageOrientationPatient": DIRECTIONS.ravel().tolist(),
        "ImagePositionPatient": [round(float(x), 6) for x in place],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": 2,
        "RescaleIntercept": -1024,
        "PixelData": pixels.astype("<i2").tobytes(),
    }
    for name, value in (values | elements).items():
        if value is not None:
            setattr(slice_, name, value)
    file.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(file, slice_, enforce_file_format=True)


@pytest.fixture
def voxels() -> np.ndarray:
    """(slices, rows, columns) int16"""
    return np.random.default_rng(0).integers(-50, 900, (5, 6, 4)).astype(np.int16)


@pytest.fixture
def series(tmp_path: Path, voxels: np.ndarray) -> Path:
    """The files are named in another order than the slices lie, two of them without an ending."""
    folder = tmp_path / "thorax"
    for index, name in enumerate(["c.dcm", "a", "e.dcm", "b.DCM", "d"]):
        write_slice(folder / name, voxels[index], ORIGIN + index * STEP * NORMAL)
    (folder / "notes.txt").write_text("no slice")
    return folder


def test_a_series_is_its_array_with_its_affine(series: Path, voxels: np.ndarray) -> None:
    lps = np.eye(4)
    lps[:3] = np.column_stack([DIRECTIONS[0] * SPACING[1], DIRECTIONS[1] * SPACING[0], STEP * NORMAL, ORIGIN])
    expected = scan_from_array(2.0 * voxels.transpose(2, 1, 0) - 1024, np.diag([-1, -1, 1, 1]) @ lps)
    scan = read_series(series)
    np.testing.assert_array_equal(scan.image, expected.image)
    assert scan.image.dtype == np.float32
    np.testing.assert_allclose(scan.grid.affine, expected.grid.affine, atol=1e-5)
    assert scan.grid.shape == (4, 6, 5)
    assert sorted(scan.grid.spacing) == [0.7, 0.9, 2.5]


def test_each_slice_has_its_own_rescaling(series: Path, voxels: np.ndarray) -> None:
    before = read_series(series).image
    write_slice(series / "c.dcm", voxels[0], ORIGIN, RescaleSlope=None, RescaleIntercept=None)
    changed = read_series(series).image != before
    assert changed.sum() == np.count_nonzero(voxels[0] * 2 - 1024 != voxels[0])


def test_a_single_slice_is_as_thick_as_it_says(tmp_path: Path, voxels: np.ndarray) -> None:
    write_slice(tmp_path / "one.dcm", voxels[0], ORIGIN, SliceThickness=7)
    assert sorted(read_series(tmp_path).grid.spacing) == [0.7, 0.9, 7.0]


def test_scans_to_predict_may_be_series(series: Path, tmp_path: Path, write_nifti: Callable) -> None:
    other = write_nifti(tmp_path / "files/head.nii.gz", np.ones((3, 3, 3), np.uint8))
    assert is_series(series)
    assert [(case.name, case.images) for case in list_scans([series, other.parent], 1)] == [
        ("head", (other,)),
        ("thorax", (series,)),
    ]
    with pytest.raises(InputError, match="one of 2 channels"):
        list_scans([series], 2)
    same = write_nifti(tmp_path / "files/thorax.nii.gz", np.ones((3, 3, 3), np.uint8))
    with pytest.raises(InputError, match="same scan"):
        list_scans([series, same], 1)


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_series(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_several_series_are_named(series: Path, voxels: np.ndarray) -> None:
    write_slice(series / "x.dcm", voxels[0], ORIGIN, SeriesInstanceUID=SERIES + ".2", SeriesDescription="scout")
    message = refused(series)
    assert "2 series: thorax (5 files, " in message
    assert "scout (1 files, " in message


CHANGES = {
    "a missing slice": ({"file": "e.dcm", "remove": True}, "unevenly"),
    "a slice twice": ({"place": ORIGIN + STEP * NORMAL}, "one place"),
    "an uneven step": ({"place": ORIGIN + 5.2 * STEP * NORMAL}, "unevenly"),
    "another size": ({"Rows": 4, "Columns": 6}, "differ in size"),
    "another pixel spacing": ({"PixelSpacing": [0.7, 0.8]}, "differ in"),
    "another orientation": ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "differ in"),
    "no orientation": ({"ImageOrientationPatient": None}, "differ in"),
    "colour": ({"SamplesPerPixel": 3}, "differ in"),
    "too few pixels": ({"PixelData": b"1234"}, "pixels cannot be read"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_stack_of_slices_is_refused(name: str, series: Path, voxels: np.ndarray) -> None:
    elements, words = CHANGES[name]
    elements = dict(elements)
    file = series / elements.pop("file", "x.dcm")
    if elements.pop("remove", False):
        file.unlink()
    else:
        write_slice(file, voxels[0], elements.pop("place", ORIGIN + 5 * STEP * NORMAL), **elements)
    assert words in refused(series)


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"PixelSpacing": None}, "geometry"),
        ({"PixelSpacing": [0, 0.9]}, "affine"),
        ({"ImagePositionPatient": None}, "geometry"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "geometry|affine|place"),
        ({"Rows": 60000, "Columns": 60000}, "claim|pixels cannot be read"),
        ({"NumberOfFrames": 3}, "several frames"),
        ({"SamplesPerPixel": 3}, "colours"),
        ({"RescaleIntercept": "1e300"}, "infinite"),
    ],
)
def test_slices_without_a_use_are_refused(elements: dict, words: str, tmp_path: Path, voxels: np.ndarray) -> None:
    for index in range(3):
        place = ORIGIN + index * STEP * NORMAL
        write_slice(tmp_path / f"{index}.dcm", voxels[index], place, **elements)
    with pytest.raises(InputError, match=words):
        read_series(tmp_path)


def test_compressed_pixels_name_what_reads_them(series: Path, voxels: np.ndarray) -> None:
    slice_ = pydicom.dcmread(series / "a")
    slice_.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    slice_.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    slice_["PixelData"].VR = "OB"
    pydicom.dcmwrite(series / "a", slice_)
    message = refused(series)
    assert "JPEG 2000" in message
    assert "pylibjpeg" in message


def test_without_pydicom_the_extra_is_named(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert 'pip install "utnetv2-fast[dicom]"' in refused(series)


@pytest.mark.parametrize("content", [b"", b"no DICOM at all", bytes(128) + b"DICM", bytes(128) + b"DICM" + bytes(50)])
def test_other_files_are_refused(content: bytes, series: Path) -> None:
    (series / "x.dcm").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.dcm"):
        read_series(series)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no slice")
    assert not is_series(tmp_path)
    assert "no DICOM image" in refused(tmp_path)
