"""Preparing does each case once, completely or not at all, and the same whatever the order of the threads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from utnetv2_fast.data import prepare as module
from utnetv2_fast.data.dataset import Dataset, read_dataset
from utnetv2_fast.data.nifti import read_label, read_scan
from utnetv2_fast.data.plan import Preparation
from utnetv2_fast.data.prepare import Prepared, default_folder, prepare
from utnetv2_fast.data.preprocess import preprocess_image, preprocess_label
from utnetv2_fast.data.splits import load_or_make_splits
from utnetv2_fast.errors import InputError
from utnetv2_fast.ranks import Ranks


@pytest.fixture
def source(tmp_path: Path, make_dataset: Callable, make_affine: Callable) -> Path:
    affine = make_affine((0, 2, 1), (1, -1, -1), (1.0, 4.0, 1.5))
    patients = {"CASE00": "A", "CASE01": "A", "CASE02": "B", "CASE03": "C"}
    return make_dataset(tmp_path / "source", cases=4, affine=affine, patients=patients)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cases that were preprocessed, as it happens."""
    names: list[str] = []
    original = module._store_case

    def store(case: object, *arguments: object) -> None:
        names.append(case.name)
        original(case, *arguments)

    monkeypatch.setattr(module, "_store_case", store)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dimensions", [2, 3])
def test_what_is_stored(source: Path, tmp_path: Path, dimensions: int) -> None:
    dataset = read_dataset(source)
    prepared = prepare(dataset, tmp_path / "out", dimensions)
    assert prepared.plan.dimensions == dimensions
    assert [case.name for case in prepared.cases] == [case.name for case in dataset.cases]
    assert [case.patient for case in prepared.cases] == ["A", "A", "B", "C"]
    for case, found in zip(dataset.cases, prepared.cases, strict=True):
        image, geometry = preprocess_image(read_scan(case.images), prepared.plan)
        label = preprocess_label(read_label(case.label)[0], geometry, prepared.plan)
        assert found.image().dtype == np.float16
        np.testing.assert_array_equal(found.image(), image.astype(np.float16))
        np.testing.assert_array_equal(found.label(), label)
        assert isinstance(found.image(), np.memmap)
        assert isinstance(found.label(), np.memmap)
        foreground = found.foreground()
        assert foreground.dtype == np.int32
        np.testing.assert_array_equal(foreground[:, 0], label[tuple(foreground[:, 1:].T)])
        assert len(np.unique(foreground[:, 1:], axis=0)) == len(foreground) == (label > 0).sum()
        assert (np.diff(foreground[:, 0]) >= 0).all()
    assert sorted(contents(tmp_path / "out")) == sorted(
        ["plan.json", "fingerprint.json", "dataset.json"]
        + [f"cases/CASE0{n}.{part}" for n in range(4) for part in ("json", "image.npy", "label.npy", "foreground.npy")]
    )


def test_oblique_slices_are_stored_whichever_way_they_lie(
    tmp_path: Path, make_dataset: Callable, short_axis_affines: list[np.ndarray]
) -> None:
    """Those that lie otherwise than most have axes of their own."""
    source = make_dataset(tmp_path / "source", cases=4, shape=(14, 12, 5))
    for number, affine in enumerate((*short_axis_affines, short_axis_affines[1])):
        for file in (source / f"imagesTr/CASE{number:02d}_0000.nii.gz", source / f"labelsTr/CASE{number:02d}.nii.gz"):
            nib.save(nib.Nifti1Image(np.asarray(nib.load(file).dataobj), affine), file)
    prepared = prepare(read_dataset(source), tmp_path / "out", 2)
    assert (prepared.plan.axes, prepared.plan.median_shape[0]) == ((1, 0, 2), 5)
    assert [case.axes for case in prepared.cases] == [(2, 0, 1), None, (0, 1, 2), None]
    assert all(case.image().shape[1] == len(case.label()) == 5 for case in prepared.cases)


def test_many_foreground_voxels_are_sampled_evenly() -> None:
    label = np.zeros((40, 40, 40), np.uint8)
    label[10:] = 1
    label[0, 0, :7] = 5
    foreground = module._foreground(label)
    assert [(foreground[:, 0] == value).sum() for value in (1, 5)] == [10_000, 7]
    assert len(np.unique(foreground, axis=0)) == len(foreground)
    np.testing.assert_allclose(foreground[foreground[:, 0] == 1, 1:].mean(0), (24.5, 19.5, 19.5), atol=0.5)
    np.testing.assert_array_equal(foreground, module._foreground(label))
    assert module._foreground(np.zeros((2, 3, 4), np.uint8)).shape == (0, 4)


def test_values_beyond_half_precision_are_clipped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bright(*arguments: object) -> tuple[np.ndarray, object]:
        image, geometry = preprocess_image(*arguments)
        return image * 1e6, geometry

    monkeypatch.setattr(module, "preprocess_image", bright)
    image = prepare(read_dataset(source), tmp_path / "out", 3).cases[0].image()
    assert (image.min(), image.max()) == (-65504, 65504)


def test_done_once(source: Path, tmp_path: Path, stored: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(read_dataset(source), tmp_path / "out", 3)
    before = contents(tmp_path / "out")
    assert sorted(stored) == ["CASE00", "CASE01", "CASE02", "CASE03"]
    stored.clear()

    def fail(*arguments: object) -> None:
        raise AssertionError("no scan needs to be read again")

    monkeypatch.setattr(module, "compute_fingerprint", fail)
    assert prepare(read_dataset(source), tmp_path / "out", 3) == first
    assert stored == []
    assert contents(tmp_path / "out") == before
    assert Prepared.load(tmp_path / "out") == first


def test_what_changed_is_done_again(source: Path, tmp_path: Path, stored: list[str], write_nifti: Callable) -> None:
    prepare(read_dataset(source), tmp_path / "out", 3)
    stored.clear()
    file = source / "imagesTr/CASE02_0000.nii.gz"
    old = nib.load(file)
    write_nifti(file, np.asarray(old.dataobj)[::-1].copy(), old.affine)
    prepared = prepare(read_dataset(source), tmp_path / "out", 3)
    assert stored == ["CASE02"]
    expected, _ = preprocess_image(read_scan([file]), prepared.plan)
    np.testing.assert_array_equal(prepared.cases[2].image(), expected.astype(np.float16))


def test_a_new_time_alone_counts_as_a_change(source: Path, tmp_path: Path, stored: list[str]) -> None:
    prepare(read_dataset(source), tmp_path / "out", 3)
    stored.clear()
    os.utime(source / "labelsTr/CASE01.nii.gz", ns=(1, 1))
    prepare(read_dataset(source), tmp_path / "out", 3)
    assert stored == ["CASE01"]


def test_another_recipe_makes_everything_anew(
    source: Path, tmp_path: Path, stored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(read_dataset(source), tmp_path / "out", 3)
    stored.clear()
    monkeypatch.setattr(module, "_FORMAT", module._FORMAT + 1)
    prepare(read_dataset(source), tmp_path / "out", 3)
    assert len(stored) == 4


def test_what_others_prepared_is_not_replaced(
    source: Path, tmp_path: Path, stored: list[str], make_dataset: Callable[..., Path]
) -> None:
    """Two datasets of one folder name meet in the default folder, with the same case names perhaps."""
    prepared = prepare(read_dataset(source), tmp_path / "out", 3)
    stored.clear()
    with pytest.raises(InputError, match="prepared for 3D"):
        prepare(read_dataset(source), tmp_path / "out", 2)
    other = make_dataset(tmp_path / "other" / "source", cases=4, shape=(10, 11, 12))
    with pytest.raises(InputError, match="of another dataset"):
        prepare(read_dataset(other), tmp_path / "out", 3)
    assert stored == []
    assert Prepared.load(tmp_path / "out") == prepared


def test_cases_come_and_go(source: Path, tmp_path: Path, stored: list[str]) -> None:
    prepare(read_dataset(source), tmp_path / "out", 3)
    stored.clear()
    (source / "cases.csv").unlink()
    for kind, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (source / kind / f"CASE03{ending}").rename(source / kind / f"CASE09{ending}")
    prepared = prepare(read_dataset(source), tmp_path / "out", 3)
    assert [case.name for case in prepared.cases] == ["CASE00", "CASE01", "CASE02", "CASE09"]
    assert not list((tmp_path / "out/cases").glob("CASE03*"))
    assert len(load_or_make_splits(prepared)) == 4


@pytest.mark.parametrize("broken", ["image", "label", "foreground", "record"])
def test_stopped_anywhere_it_goes_on_there(
    broken: str, source: Path, tmp_path: Path, stored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = prepare(read_dataset(source), tmp_path / "reference", 3)
    stored.clear()
    with monkeypatch.context() as patch:
        save, write = np.save, module.write_text_atomically

        def failing_save(file: Path, array: np.ndarray) -> None:
            if "CASE02" in str(file) and array.dtype == {"image": "f2", "label": "u1", "foreground": "i4"}.get(broken):
                Path(file).write_bytes(b"half")
                raise OSError("disk full")
            save(file, array)

        def failing_write(file: Path, text: str) -> None:
            if file.name == "CASE02.json" and broken == "record":
                raise OSError("disk full")
            write(file, text)

        patch.setattr(np, "save", failing_save)
        patch.setattr(module, "write_text_atomically", failing_write)
        with pytest.raises(OSError, match="disk full"):
            prepare(read_dataset(source), tmp_path / "out", 3)
    with pytest.raises(InputError, match="not a completely prepared"):
        Prepared.load(tmp_path / "out")
    assert not [file for file in (tmp_path / "out/cases").iterdir() if file.name.startswith(".")]
    done = {file.stem for file in (tmp_path / "out/cases").glob("*.json")}
    assert "CASE02" not in done
    stored.clear()
    prepare(read_dataset(source), tmp_path / "out", 3)
    assert not done & set(stored)
    assert contents(tmp_path / "out") == contents(reference.folder)


@pytest.mark.parametrize("late", [False, True])
def test_ranks_share_the_cases(late: bool, source: Path, tmp_path: Path, stored: list[str]) -> None:
    """Threads stand for ranks; with a late one that finds everything done. One case changes, one goes."""
    folder = tmp_path / "shared"

    def rank(number: int) -> Prepared:
        return prepare(read_dataset(source), folder, 3, ranks=Ranks(number, 2, number))

    def all_ranks() -> list[Prepared]:
        if late:
            return [rank(1), rank(0)]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(rank, range(2)))

    for names in (["CASE00", "CASE01", "CASE02", "CASE03"], ["CASE00"]):
        alone = prepare(read_dataset(source), tmp_path / "alone", 3)
        stored.clear()
        for prepared in all_ranks():
            assert prepared.plan == alone.plan
            assert [case.name for case in prepared.cases] == [case.name for case in alone.cases]
        assert sorted(stored) == names
        assert contents(folder) == contents(alone.folder)
        os.utime(source / "labelsTr" / "CASE00.nii.gz", (1, 1))
        (source / "imagesTr" / "CASE03_0000.nii.gz").unlink(missing_ok=True)
        (source / "cases.csv").write_text("case,patient\nCASE00,A\nCASE01,A\nCASE02,B\n")


def test_every_rank_names_what_is_wrong_with_a_dataset(source: Path, tmp_path: Path) -> None:
    file = source / "imagesTr/CASE01_0000.nii.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    for number in range(2):
        with pytest.raises(InputError, match=r"CASE01_0000\.nii\.gz: truncated"):
            prepare(read_dataset(source), tmp_path / "out", 3, ranks=Ranks(number, 2, number))
    file.write_bytes(whole)
    prepare(read_dataset(source), tmp_path / "out", 3, ranks=Ranks(1, 2, 1))
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_that_is_being_changed_is_not_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(read_dataset(source), tmp_path / "out", 3)

    def fail(*arguments: object) -> None:
        raise OSError("stopped")

    monkeypatch.setattr(module, "_store_case", fail)
    monkeypatch.setattr(module, "_FORMAT", module._FORMAT + 1)
    with pytest.raises(OSError, match="stopped"):
        prepare(read_dataset(source), tmp_path / "out", 3)
    with pytest.raises(InputError, match="not a completely prepared"):
        Prepared.load(tmp_path / "out")


def test_bad_datasets_leave_nothing_behind(source: Path, tmp_path: Path) -> None:
    for name in ("CASE01", "CASE03"):
        file = source / f"imagesTr/{name}_0000.nii.gz"
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"CASE01_0000\.nii\.gz: truncated.*\(1 more"):
        prepare(read_dataset(source), tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


def test_the_dataset_is_not_written_to(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    prepare(read_dataset(source), tmp_path / "out", 3)
    assert contents(source) == before


def test_the_way_the_source_is_called_does_not_matter(source: Path, tmp_path: Path, stored: list[str]) -> None:
    prepare(read_dataset(source), tmp_path / "out", 3)
    stored.clear()
    shutil.copytree(source, tmp_path / "copy")  # with its modification times
    prepare(read_dataset(tmp_path / "copy"), tmp_path / "out", 3)
    assert stored == []


@pytest.mark.parametrize("file", ["plan.json", "cases/CASE01.json"])
def test_damaged_folders(source: Path, tmp_path: Path, file: str) -> None:
    prepared = prepare(read_dataset(source), tmp_path / "out", 3)
    (tmp_path / "out" / file).write_text('{"dataset": 3}')
    with pytest.raises(InputError, match="prepare it anew"):
        Prepared.load(tmp_path / "out")
    assert prepare(read_dataset(source), tmp_path / "out", 3) == prepared


def test_folders_that_are_not_prepared(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{folder}: not a completely prepared"):
            Prepared.load(folder)


def test_default_folder_tells_datasets_and_dimensions_apart(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "acdc", "ACDC", ("MRI",), {"background": 0, "a": 1}, ())
    assert default_folder(dataset, 2) == Path("prepared/acdc-2d")


def test_real_scans(shared_data: Path, tmp_path: Path) -> None:
    prepared = prepare(read_dataset(shared_data / "hippocampus"), tmp_path / "out", 3)
    assert len(prepared.cases) == 200
    assert prepared.plan.spacing == (1.0, 1.0, 1.0)
    assert prepared.plan.median_shape == (36, 50, 35)
    assert [len(split["val"]) for split in load_or_make_splits(prepared)] == [40] * 5


def test_a_preparation_of_its_own(source: Path, tmp_path: Path, stored: list[str]) -> None:
    dataset = read_dataset(source)
    cropping = Preparation(crop="label", label_context=(1, 2, 2), resampling="nearest_across")
    assert default_folder(dataset, 3) == Path("prepared/source-3d")
    assert default_folder(dataset, 3, cropping) != default_folder(dataset, 3, Preparation(crop="none"))
    prepared = prepare(dataset, tmp_path / "out", 3, preparation=cropping)
    for case, found in zip(dataset.cases, prepared.cases, strict=True):
        label, _ = read_label(case.label)
        image, geometry = preprocess_image(read_scan(case.images), prepared.plan, label)
        np.testing.assert_array_equal(found.image(), image.astype(np.float16))
        np.testing.assert_array_equal(found.label(), preprocess_label(label, geometry, prepared.plan))
    stored.clear()
    prepare(dataset, tmp_path / "out", 3, preparation=cropping)
    assert stored == []
    prepare(dataset, tmp_path / "out", 3)
    assert sorted(stored) == ["CASE00", "CASE01", "CASE02", "CASE03"]


def test_what_is_known_of_a_case_is_kept(source: Path, tmp_path: Path) -> None:
    table = source / "cases.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},vendor", *(f"{line},{'xy'[n % 2]}" for n, line in enumerate(lines))]) + "\n")
    prepared = prepare(read_dataset(source), tmp_path / "out", 3)
    assert [case.metadata for case in prepared.cases] == [{"vendor": "xy"[n % 2]} for n in range(4)]
