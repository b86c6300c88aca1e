"""Every public layout becomes an nnU-Net folder, all of it or nothing, with one meaning of its labels and columns."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from utnetv2_fast.data import convert as module
from utnetv2_fast.data.convert import convert
from utnetv2_fast.data.dataset import Dataset
from utnetv2_fast.data.nifti import read_scan
from utnetv2_fast.errors import InputError


@pytest.fixture
def acdc(tmp_path: Path, write_nifti: Callable) -> Path:
    """Three patients in the challenge's layout."""
    source = tmp_path / "database"
    for number, group in ((1, "DCM"), (2, "NOR"), (13, "RV")):
        folder = source / f"training/patient{number:03d}"
        for frame in (1, 9):
            rng = np.random.default_rng([number, frame])
            stem = f"patient{number:03d}_frame{frame:02d}"
            write_nifti(folder / f"{stem}.nii.gz", rng.integers(0, 255, (9, 8, 4)).astype(np.uint8))
            write_nifti(folder / f"{stem}_gt.nii.gz", rng.integers(0, 4, (9, 8, 4)).astype(np.uint8))
        write_nifti(folder / f"patient{number:03d}_4d.nii.gz", np.zeros((9, 8, 4, 3), np.uint8))
        (folder / "Info.cfg").write_text(f"ED: 1\nES: 9\nGroup: {group}\nHeight: 180.0\nNbFrame: 30\n")
    return source


@pytest.mark.parametrize("inner", [False, True])
def test_layout(inner: bool, acdc: Path, tmp_path: Path) -> None:
    dataset = convert("acdc", acdc / "training" if inner else acdc, tmp_path / "new/acdc")
    assert dataset.labels == {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    assert len(dataset.cases) == 6
    case = dataset.cases[-1]
    assert (case.name, case.patient) == ("patient013_frame09", "patient013")
    expected = {"group": "RV", "phase": "ES", "subset": "training", "vendor": "Siemens", "centre": "Dijon"}
    assert case.metadata == expected
    original = acdc / "training/patient013/patient013_frame09"
    assert case.images[0].read_bytes() == original.with_name(original.name + ".nii.gz").read_bytes()
    assert case.label.read_bytes() == original.with_name(original.name + "_gt.nii.gz").read_bytes()
    assert not case.images[0].is_symlink()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["acdc"]


def test_done_once(acdc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = convert("acdc", acdc, tmp_path / "acdc")

    def fail(*arguments: object) -> None:
        raise AssertionError("nothing is to be copied again")

    monkeypatch.setattr(module.shutil, "copyfile", fail)
    assert convert("acdc", acdc, tmp_path / "acdc") == first


def test_other_content_is_not_touched(acdc: Path, tmp_path: Path) -> None:
    destination = tmp_path / "acdc"
    convert("acdc", acdc, destination)
    (destination / "labelsTr/patient001_frame01.nii.gz").unlink()
    with pytest.raises(InputError, match="acdc: exists with other content"):
        convert("acdc", acdc, destination)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(InputError, match="mine: exists with other content"):
        convert("acdc", acdc, tmp_path / "mine")
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match="file: exists with other content"):
        convert("acdc", acdc, tmp_path / "file")
    assert (tmp_path / "mine/notes.txt").read_text() == (tmp_path / "file").read_text() == "keep"


def test_an_empty_folder_is_filled(acdc: Path, tmp_path: Path) -> None:
    (tmp_path / "acdc").mkdir()
    assert len(convert("acdc", acdc, tmp_path / "acdc").cases) == 6


def test_stopped_half_way_it_leaves_nothing(acdc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def fail(source: Path, destination: Path) -> None:
        if "patient002" in str(source):
            raise OSError("disk full")
        copy(source, destination)

    monkeypatch.setattr(module.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        convert("acdc", acdc, tmp_path / "new/acdc")
    assert not list((tmp_path / "new").iterdir())


def test_patients_with_one_scan_are_one_patient(acdc: Path, tmp_path: Path) -> None:
    training = acdc / "training"
    for frame in ("01", "09"):
        shutil.copy(
            training / f"patient001/patient001_frame{frame}.nii.gz",
            training / f"patient013/patient013_frame{frame}.nii.gz",
        )
    cases = convert("acdc", acdc, tmp_path / "acdc").cases
    assert [case.patient for case in cases] == ["patient001"] * 2 + ["patient002"] * 2 + ["patient001"] * 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder.parent), "no folder patientNNN"),
        (lambda folder: (folder / "Info.cfg").unlink(), r"Info\.cfg: no such file"),
        (lambda folder: (folder / "Info.cfg").write_text("ED: 1\nGroup: DCM\n"), r"Info\.cfg: lacks ES"),
        (lambda folder: (folder / "Info.cfg").write_text("ED: one\nES: 9\nGroup: DCM\n"), r"Info\.cfg: lacks ED"),
        (lambda folder: (folder / "Info.cfg").write_text("ED: 1\nES: 9\n"), "or Group"),
        (lambda folder: (folder / "Info.cfg").write_bytes(b"\xff\x00"), "lacks ED"),
        (lambda folder: (folder / "Info.cfg").write_text("ED: 1\nES: 7\nGroup: DCM\n"), r"frame07\.nii\.gz: no such"),
        (lambda folder: (folder / "patient002_frame09_gt.nii.gz").unlink(), r"frame09_gt\.nii\.gz: no such"),
        (lambda folder: (folder / "patient002_frame09.nii.gz").write_bytes(b""), r"frame09\.nii\.gz: "),
    ],
)
def test_other_layouts(acdc: Path, tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(acdc / "training/patient002")
    with pytest.raises(InputError, match=words):
        convert("acdc", acdc, tmp_path / "new/acdc")
    assert not (tmp_path / "new").exists()


def test_the_acdc_test_set_is_a_dataset_of_its_own(acdc: Path, tmp_path: Path) -> None:
    (acdc / "training").rename(acdc / "testing")
    info = acdc / "testing/patient002/Info.cfg"
    info.write_text("ED: 1\nES: 9\nNbFrame: 30\n")
    dataset = convert("acdc", acdc / "testing", tmp_path / "acdc")
    assert {case.metadata["subset"] for case in dataset.cases} == {"testing"}
    assert [case.metadata["group"] for case in dataset.cases] == ["DCM"] * 2 + [""] * 2 + ["RV"] * 2
    with pytest.raises(InputError, match="no folder patientNNN"):
        convert("acdc", acdc, tmp_path / "other")


# --- other layouts -------------------------------------------------------------------------------------------------

LV_FIRST = {0: 0, 1: 3, 2: 2, 3: 1}  # M&Ms, M&Ms-2, UK Biobank -> RV 1, MYO 2, LV 3
# The slices of this heart are stacked from right to left, more than in any other direction.
SHORT_AXIS = np.array([[2, 3, -6, 0], [-3, 6, 2, 0], [-6, -2, -3, 0], [0, 0, 0, 7]]) / 7 * [1.25, 1.5, 9.0, 1.0]


@pytest.fixture
def cine(write_nifti: Callable) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """cine(image, label, frames, seed) writes a scan and its label map, obliquely, and returns them (i, j, k[, T])."""

    def write(image: Path, label: Path, frames: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        shape = (9, 8, 4) if frames is None else (9, 8, 4, frames)
        scan = rng.integers(0, 900, shape).astype(np.int16)
        classes = rng.integers(0, 4, shape).astype(np.uint8)
        write_nifti(image, scan, SHORT_AXIS)
        write_nifti(label, classes, SHORT_AXIS)
        return scan, classes

    return write


def write_table(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def stored(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray, Mapping[str, str], str]:
    """What was converted: scan and label map (i, j, k), metadata, patient."""
    case = next(case for case in dataset.cases if case.name == name)
    image, label = nib.load(case.images[0]), nib.load(case.label)
    for file in (image, label):
        np.testing.assert_allclose(file.affine, SHORT_AXIS, atol=1e-5)
    return np.asarray(image.dataobj), np.asarray(label.dataobj), case.metadata, case.patient


def relabelled(label: np.ndarray) -> np.ndarray:
    return np.vectorize(LV_FIRST.get)(label)


@pytest.fixture
def mnms(tmp_path: Path, cine: Callable) -> tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    source, made = tmp_path / "OpenDataset", {}
    rows = []
    subjects = [("A1B2", "Training/Labeled", "Siemens"), ("C3D4", "Testing", "GE"), ("E5F6", "Validation", "Canon")]
    for number, (code, folder, vendor) in enumerate(subjects):
        place = source / folder / code
        made[code] = cine(place / f"{code}_sa.nii.gz", place / f"{code}_sa_gt.nii.gz", 6, number)
        information = {"External code": code, "VendorName": vendor, "Vendor": "ACD"[number], "Centre": number + 1}
        rows.append({"": number, **information, "ED": 0, "ES": 3 + number, "Pathology": "HCM", "Sex": "F"})
    unlabelled = source / "Training/Unlabeled/X9X9/X9X9_sa.nii.gz"
    unlabelled.parent.mkdir(parents=True)
    shutil.copy(source / "Testing/C3D4/C3D4_sa.nii.gz", unlabelled)
    write_table(source / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv", rows)
    return source, made


def test_mnms(mnms: tuple[Path, dict], tmp_path: Path) -> None:
    source, made = mnms
    dataset = convert("mnms", source, tmp_path / "mnms")
    assert (dataset.name, dataset.labels) == ("MnMs", {"background": 0, "RV": 1, "MYO": 2, "LV": 3})
    assert [case.name for case in dataset.cases] == [f"{code}_{phase}" for code in made for phase in ("ED", "ES")]
    image, label, metadata, patient = stored(dataset, "C3D4_ES")
    np.testing.assert_array_equal(image, made["C3D4"][0][..., 4])
    np.testing.assert_array_equal(label, relabelled(made["C3D4"][1][..., 4]))
    expected = {"phase": "ES", "subset": "testing", "vendor": "GE", "centre": "2", "pathology": "HCM"}
    assert (metadata, patient) == (expected, "C3D4")
    assert {case.metadata["subset"] for case in dataset.cases} == {"training", "validation", "testing"}
    again = convert("mnms", source, tmp_path / "mnms")
    assert again == dataset
    next((tmp_path / "mnms/labelsTr").iterdir()).unlink()
    with pytest.raises(InputError, match="exists with other content"):
        convert("mnms", source, tmp_path / "mnms")


def test_a_cine_file_is_read_once(mnms: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = module.read_frames

    def read_frames(file: Path, *arguments: object) -> object:
        read.append(file.name)
        return original(file, *arguments)

    monkeypatch.setattr(module, "read_frames", read_frames)
    convert("mnms", mnms[0], tmp_path / "mnms")
    assert sorted(read) == sorted(f"{code}_sa{part}.nii.gz" for code in mnms[1] for part in ("", "_gt"))


def test_label_maps_lie_where_their_scans_do(mnms: tuple[Path, dict], tmp_path: Path, write_nifti: Callable) -> None:
    """A label map of the same voxels whose header has lost its place."""
    source, made = mnms
    write_nifti(source / "Testing/C3D4/C3D4_sa_gt.nii.gz", made["C3D4"][1])
    _, label, _, _ = stored(convert("mnms", source, tmp_path / "mnms"), "C3D4_ED")
    np.testing.assert_array_equal(label, relabelled(made["C3D4"][1][..., 0]))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("External code", "Code", "no CSV with the columns External code, VendorName"),
        ("C3D4,GE", "C3D5,GE", r"C3D4_sa_gt\.nii\.gz: no line"),
        (",0,4,HCM", ",0,six,HCM", "C3D4 .*lacks ES"),
        (",0,4,HCM", ",0,9,HCM", "has 6 frames, but frame 9"),
        (",0,4,HCM,F", ",0,4", "more or fewer values"),
    ],
)
def test_mnms_with_another_table(mnms: tuple[Path, dict], tmp_path: Path, old: str, new: str, words: str) -> None:
    [table] = mnms[0].glob("*.csv")
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(InputError, match=words):
        convert("mnms", mnms[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_labels_that_a_layout_does_not_have(mnms: tuple[Path, dict], tmp_path: Path, write_nifti: Callable) -> None:
    file = mnms[0] / "Testing/C3D4/C3D4_sa_gt.nii.gz"
    write_nifti(file, np.full((9, 8, 4, 6), 4, np.uint8))
    with pytest.raises(InputError, match=r"C3D4_sa_gt\.nii\.gz: holds the label 4"):
        convert("mnms", mnms[0], tmp_path / "new")
    file.with_name("C3D4_sa.nii.gz").unlink()
    with pytest.raises(InputError, match=r"C3D4_sa\.nii\.gz: no such file"):
        convert("mnms", mnms[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_mnms2(tmp_path: Path, cine: Callable, write_nifti: Callable) -> None:
    source, made = tmp_path / "MnM2", {}
    for number in (7, 161, 300):
        for phase in ("ED", "ES"):
            stem = source / f"dataset/{number:03d}/{number:03d}"
            files = Path(f"{stem}_SA_{phase}.nii.gz"), Path(f"{stem}_SA_{phase}_gt.nii.gz")
            made[number, phase] = cine(*files, None, number + len(phase))
        write_nifti(Path(f"{stem}_LA_ED_gt.nii.gz"), np.ones((5, 5, 1), np.uint8))
        write_nifti(Path(f"{stem}_SA_CINE.nii.gz"), np.ones((5, 5, 1, 9), np.uint8))
    rows = [
        {"SUBJECT_CODE": 7, "DISEASE": "NOR", "VENDOR": "SIEMENS", "SCANNER": "Avanto", "FIELD": "1,5"},
        {"SUBJECT_CODE": 161, "DISEASE": "LV", "VENDOR": "Philips Medical Systems", "SCANNER": "Achieva", "FIELD": "3"},
        {"SUBJECT_CODE": 300, "DISEASE": "HCM", "VENDOR": "GE MEDICAL SYSTEMS", "SCANNER": "Signa", "FIELD": "1,5"},
    ]
    write_table(source / "dataset_information.csv", rows)
    dataset = convert("mnms2", source, tmp_path / "mnms2")
    assert len(dataset.cases) == 6
    image, label, metadata, patient = stored(dataset, "300_ES")
    np.testing.assert_array_equal(image, made[300, "ES"][0])
    np.testing.assert_array_equal(label, relabelled(made[300, "ES"][1]))
    assert patient == "300"
    assert metadata == {
        "phase": "ES",
        "subset": "testing",
        "vendor": "GE",
        "pathology": "HCM",
        "scanner": "Signa",
        "field": "1,5",
    }
    assert [case.metadata["vendor"] for case in dataset.cases[::2]] == ["Siemens", "Philips", "GE"]
    assert [case.metadata["subset"] for case in dataset.cases[::2]] == ["training", "validation", "testing"]
    write_table(source / "dataset_information.csv", rows[:2])
    with pytest.raises(InputError, match="no line for subject 300"):
        convert("mnms2", source, tmp_path / "new")


def test_uk_biobank(tmp_path: Path, cine: Callable, write_nifti: Callable) -> None:
    source = tmp_path / "ukbb"
    phases = {
        phase: cine(source / f"1000001/sa_{phase}.nii.gz", source / f"1000001/label_sa_{phase}.nii.gz", None, seed)
        for seed, phase in enumerate(("ED", "ES"))
    }
    image, label = cine(source / "1000002/sa.nii.gz", source / "1000002/label_sa.nii.gz", 10, 5)
    file = source / "1000002/label_sa.nii.gz"
    label[..., [f for f in range(10) if f not in (0, 3, 7)]] = 0
    label[..., 3][label[..., 3] == 1] = 2  # the smallest LV: end-systole
    write_nifti(file, label, SHORT_AXIS)
    (source / "1000003").mkdir()
    write_nifti(source / "1000003/sa.nii.gz", image)

    dataset = convert("ukbb", source, tmp_path / "out")
    assert [case.name for case in dataset.cases] == [f"100000{n}_{phase}" for n in (1, 2) for phase in ("ED", "ES")]
    for name, expected_image, expected_label in [
        ("1000001_ES", phases["ES"][0], phases["ES"][1]),
        ("1000002_ED", image[..., 0], label[..., 0]),
        ("1000002_ES", image[..., 3], label[..., 3]),
    ]:
        got_image, got_label, metadata, patient = stored(dataset, name)
        np.testing.assert_array_equal(got_image, expected_image)
        np.testing.assert_array_equal(got_label, relabelled(expected_label))
        assert metadata == {"phase": name[-2:], "vendor": "Siemens"}
        assert patient == name[:7]
    (source / "1000001/sa_ES.nii.gz").unlink()
    with pytest.raises(InputError, match=r"sa_ES\.nii\.gz: no such file"):
        convert("ukbb", source, tmp_path / "new")
    shutil.rmtree(source / "1000001")
    label[..., 1:] = 0
    write_nifti(file, label, SHORT_AXIS)
    with pytest.raises(InputError, match="1 of its frames have labels"):
        convert("ukbb", source, tmp_path / "new")


def test_bcv(tmp_path: Path, write_nifti: Callable) -> None:
    training = tmp_path / "RawData/Training"
    for number in (1, 38):
        write_nifti(training / f"img/img{number:04d}.nii.gz", np.full((4, 5, 6), number, np.int16))
        write_nifti(training / f"label/label{number:04d}.nii.gz", np.full((4, 5, 6), 13, np.uint8))
    dataset = convert("bcv", tmp_path / "RawData", tmp_path / "bcv")
    assert dataset.channels == ("CT",)
    assert list(dataset.labels.values()) == list(range(14))
    assert (dataset.labels["spleen"], dataset.labels["left adrenal gland"]) == (1, 13)
    assert [case.name for case in dataset.cases] == ["img0001", "img0038"]
    assert dataset.cases[1].images[0].read_bytes() == (training / "img/img0038.nii.gz").read_bytes()
    (training / "img/img0038.nii.gz").unlink()
    with pytest.raises(InputError, match=r"img0038\.nii\.gz: no such file"):
        convert("bcv", training, tmp_path / "new")


def test_lits(tmp_path: Path, write_nifti: Callable) -> None:
    source = tmp_path / "LiTS"
    for number, folder in ((0, "Training Batch 1"), (10, "Training Batch 1"), (130, "Training Batch 2")):
        write_nifti(source / folder / f"volume-{number}.nii", np.full((4, 5, 6), number, np.int16))
        write_nifti(source / folder / f"segmentation-{number}.nii", np.full((4, 5, 6), number % 3, np.uint8))
    dataset = convert("lits", source, tmp_path / "lits")
    assert dataset.labels == {"background": 0, "liver": 1, "tumour": 2}
    assert sorted(case.name for case in dataset.cases) == ["volume-0", "volume-10", "volume-130"]
    assert read_scan(dataset.cases[-1].images).image.max() == 130
    write_nifti(source / "more/segmentation-10.nii", np.zeros((4, 5, 6), np.uint8))
    write_nifti(source / "more/volume-10.nii", np.zeros((4, 5, 6), np.int16))
    with pytest.raises(InputError, match="label map of the same case"):
        convert("lits", source, tmp_path / "new")
    for name in ("volume", "segmentation"):
        (source / f"more/{name}-10.nii").unlink()
        write_nifti(source / f"more/{name}-11.nii.gz", np.zeros((4, 5, 6), np.uint8))
    with pytest.raises(InputError, match=r"\.nii and \.nii\.gz"):
        convert("lits", source, tmp_path / "new")


@pytest.mark.parametrize("layout", ["mnms2", "ukbb", "bcv", "lits", "merge"])
def test_a_folder_of_something_else(layout: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_table(tmp_path / "empty/dataset_information.csv", [{"SUBJECT_CODE": 1, "VENDOR": "GE", "DISEASE": "x"}])
    with pytest.raises(InputError, match="empty: no "):
        convert(layout, tmp_path / "empty", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_cardiac_datasets_become_one(acdc: Path, mnms: tuple[Path, dict], tmp_path: Path, edit_json: Callable) -> None:
    convert("acdc", acdc, tmp_path / "all/acdc")
    convert("mnms", mnms[0], tmp_path / "all/mnms")
    dataset = convert("merge", tmp_path / "all", tmp_path / "cardiac")
    cases = {case.name: case for case in dataset.cases}
    assert len(cases) == 12
    first, second = cases["ACDC_patient013_frame09"], cases["MnMs_E5F6_ES"]
    assert (first.patient, second.patient) == ("ACDC_patient013", "MnMs_E5F6")
    columns = ("dataset", "subset", "vendor", "group", "pathology")
    assert [first.metadata[column] for column in columns] == ["ACDC", "training", "Siemens", "RV", ""]
    assert [second.metadata[column] for column in columns] == ["MnMs", "validation", "Canon", "", "HCM"]
    assert first.metadata.keys() == second.metadata.keys()
    edit_json(tmp_path / "all/mnms", name="ACDC")
    with pytest.raises(InputError, match="two of its datasets have one name"):
        convert("merge", tmp_path / "all", tmp_path / "new")
    edit_json(tmp_path / "all/mnms", labels={"background": 0, "LV": 1, "MYO": 2, "RV": 3})
    with pytest.raises(InputError, match="its labels or channels are not those"):
        convert("merge", tmp_path / "all", tmp_path / "new")


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no folder patientNNN"):
        convert("acdc", tmp_path / "nowhere", tmp_path / "acdc")


def test_real_scans(shared_data: Path, tmp_path: Path) -> None:
    dataset = convert("acdc", shared_data / "acdc", tmp_path / "acdc")
    assert len(dataset.cases) == 160
    # Patients 074 and 076 of the challenge are one scan, annotated twice.
    assert len({case.patient for case in dataset.cases}) == 79
