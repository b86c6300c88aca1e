"""Datasets are found as they lie, nnU-Net's or the Decathlon's; what is wrong with one is said in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from utnetv2_fast.data.dataset import inspect_dataset, list_scans, read_dataset
from utnetv2_fast.data.nifti import read_scan
from utnetv2_fast.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, make_dataset: Callable) -> Path:
    return make_dataset(tmp_path / "data", cases=3)


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def test_nnunet_raw(tmp_path: Path, make_dataset: Callable) -> None:
    folder = make_dataset(tmp_path / "Dataset007_Things", channels=("T1", "CT"))
    dataset = read_dataset(folder)
    assert (dataset.name, dataset.channels) == ("Dataset007_Things", ("T1", "CT"))
    assert dataset.labels == {"background": 0, "class1": 1, "class2": 2}
    assert [case.name for case in dataset.cases] == ["CASE00", "CASE01", "CASE02"]
    first = dataset.cases[0]
    assert first.images == (folder / "imagesTr/CASE00_0000.nii.gz", folder / "imagesTr/CASE00_0001.nii.gz")
    assert first.label == folder / "labelsTr/CASE00.nii.gz"
    assert (first.patient, first.metadata) == ("CASE00", {})


def test_channels_are_ordered_by_number_not_by_place(folder: Path, edit_json: Callable) -> None:
    names = {str(n): f"c{n}" for n in (10, 2, 0, 1, *range(3, 10))}
    for n in range(1, 11):
        for case in range(3):
            shutil.copy(
                folder / f"imagesTr/CASE{case:02d}_0000.nii.gz", folder / f"imagesTr/CASE{case:02d}_{n:04d}.nii.gz"
            )
    edit_json(folder, channel_names=names)
    dataset = read_dataset(folder)
    assert dataset.channels == tuple(f"c{n}" for n in range(11))
    assert [image.name[7:11] for image in dataset.cases[0].images] == [f"{n:04d}" for n in range(11)]


def test_explicit_paths(folder: Path, edit_json: Callable) -> None:
    entry = {"images": ["imagesTr/CASE01_0000.nii.gz"], "label": "labelsTr/CASE01.nii.gz"}
    edit_json(folder, dataset={"only": entry})
    (case,) = read_dataset(folder).cases
    assert (case.name, case.images[0].name) == ("only", "CASE01_0000.nii.gz")


def decathlon(folder: Path, edit_json: Callable, **changes: object) -> None:
    for file in (folder / "imagesTr").iterdir():
        file.rename(file.with_name(file.name.replace("_0000", "")))
    values = {
        "name": "Task",
        "channel_names": None,
        "modality": {"0": "CT"},
        "labels": {"0": "background", "2": "cyst", "1": "organ"},
        "training": [
            {"image": f"./imagesTr/CASE{n:02d}.nii.gz", "label": f"./labelsTr/CASE{n:02d}.nii.gz"} for n in (2, 0, 1)
        ],
    }
    edit_json(folder, **values | changes)


def test_decathlon(folder: Path, edit_json: Callable) -> None:
    decathlon(folder, edit_json)
    dataset = read_dataset(folder)
    assert (dataset.name, dataset.channels) == ("Task", ("CT",))
    assert list(dataset.labels.items()) == [("background", 0), ("organ", 1), ("cyst", 2)]
    assert [case.name for case in dataset.cases] == ["CASE00", "CASE01", "CASE02"]


def test_decathlon_with_all_channels_in_one_file(folder: Path, edit_json: Callable, write_nifti: Callable) -> None:
    decathlon(folder, edit_json, modality={"0": "T2", "1": "ADC"})
    for n in range(3):
        write_nifti(folder / f"imagesTr/CASE{n:02d}.nii.gz", np.full((4, 4, 4, 2), n, np.uint8))
    case = read_dataset(folder).cases[1]
    assert len(case.images) == 1
    assert read_scan(case.images, 2).image.shape == (2, 4, 4, 4)


def test_decathlon_entries_with_a_file_per_channel(folder: Path, edit_json: Callable) -> None:
    decathlon(folder, edit_json, modality={"0": "T2", "1": "ADC"})
    for file in list((folder / "imagesTr").iterdir()):
        for channel in range(2):
            shutil.copy(file, file.with_name(file.name.replace(".nii", f"_{channel:04d}.nii")))
        file.unlink()
    case = read_dataset(folder).cases[1]
    assert [image.name for image in case.images] == ["CASE01_0000.nii.gz", "CASE01_0001.nii.gz"]


def test_hidden_companions_are_not_scans(folder: Path) -> None:
    touch(folder / "imagesTr/._CASE00_0000.nii.gz", folder / "imagesTr/notes.txt")
    assert len(read_dataset(folder).cases) == 3


def test_patients(folder: Path) -> None:
    (folder / "cases.csv").write_text("patient,case,vendor\nA,CASE02,x\nB,CASE00,y\nA,CASE01,\n", encoding="utf-8-sig")
    cases = {case.name: case for case in read_dataset(folder).cases}
    assert {name: case.patient for name, case in cases.items()} == {"CASE00": "B", "CASE01": "A", "CASE02": "A"}
    assert cases["CASE02"].metadata == {"vendor": "x"}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("case,patient\nCASE00,A\nCASE01,A\n", "no line for the case CASE02"),
        ("case,patient\nCASE00,A\nCASE01,A\nCASE02,A\nCASE09,A\n", "line 5 names the case CASE09"),
        ("case,patient\nCASE00,A\nCASE01,A\nCASE02,A\nCASE00,B\n", "line 5 .*again"),
        ("case,patient\nCASE00,A\nCASE01,\nCASE02,A\n", "line 3 lacks"),
        ("case,patient\nCASE00,A\nCASE01\nCASE02,A\n", "line 3 lacks"),
        ("case,patient\nCASE00,A\nCASE01,A,C\nCASE02,A\n", "line 3 lacks"),
        ("name,person\nCASE00,A\n", "line 2 lacks"),
        ("", "no line for the case CASE00"),
        (b"case,patient\n\xff\xfe\x00", "UTF-8"),
    ],
)
def test_bad_tables(folder: Path, table: str | bytes, words: str) -> None:
    (folder / "cases.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    with pytest.raises(InputError, match=rf"cases\.csv: .*{words}"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel_names": None}, r"channel_names.*[Ff]ield required"),
        ({"channel_names": {}}, "channel_names"),
        ({"channel_names": ["T1"]}, "channel_names"),
        ({"channel_names": {"first": "T1"}}, "channel_names"),
        ({"labels": None}, "labels"),
        ({"labels": [0, 1]}, "labels"),
        ({"labels": {}}, "label values"),
        ({"labels": {"background": 0}}, "label values"),
        ({"labels": {"background": 0, "a": 1, "b": 3}}, "without gaps"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "without gaps"),
        ({"labels": {"a": 1, "b": 2}}, "without gaps"),
        ({"labels": {"heart": 0, "a": 1}}, "background"),
        ({"labels": {"background": 0, "a": "1"}}, "integer"),
        ({"labels": {"background": 0, "a": True}}, "integer"),
        ({"labels": {"background": 0, "whole": [1, 2], "part": 2}}, "region"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "ignore"),
        ({"file_ending": ".mha"}, "file_ending"),
        ({"file_ending": 7}, "file_ending"),
        ({"dataset": {"a": {"images": "x"}}}, "dataset"),
        ({"training": ["a.nii.gz"]}, "training"),
    ],
)
def test_bad_dataset_files(folder: Path, edit_json: Callable, changes: dict, words: str) -> None:
    edit_json(folder, **changes)
    with pytest.raises(InputError, match=words) as caught:
        read_dataset(folder)
    assert str(folder / "dataset.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_dataset_files_that_are_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(InputError, match=r"dataset\.json"):
        read_dataset(folder)


def test_absent_things(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no dataset\.json"):
        read_dataset(tmp_path / "empty")
    for file in (folder / "imagesTr").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="data: no case"):
        read_dataset(folder)
    (folder / "imagesTr").rmdir()
    with pytest.raises(InputError, match="imagesTr: no such folder"):
        read_dataset(folder)


def test_missing_files_are_all_found(tmp_path: Path, make_dataset: Callable) -> None:
    patients = {f"CASE{n:02d}": "A" for n in range(4)}
    folder = make_dataset(tmp_path, cases=4, channels=("a", "b"), patients=patients)
    (folder / "imagesTr/CASE01_0001.nii.gz").unlink()
    (folder / "labelsTr/CASE02.nii.gz").unlink()
    touch(folder / "imagesTr/CASE03_0002.nii.gz", folder / "imagesTr/stray.nii.gz")
    dataset, problems = inspect_dataset(folder)
    assert [case.name for case in dataset.cases] == ["CASE00"]
    for words in ("channel 1 of case CASE01 is missing", "label map of case CASE02", "CASE03_0002", "stray"):
        assert sum(words in problem for problem in problems) == 1, words
    assert len(problems) == 4
    with pytest.raises(InputError, match=r"\(3 more"):
        read_dataset(folder)


@pytest.mark.parametrize("how", ["parent", "absolute", "link to a file", "link to a folder"])
def test_files_outside_the_folder_are_refused(how: str, tmp_path: Path, folder: Path, edit_json: Callable) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(folder / "imagesTr", outside)
    target = outside / "CASE00_0000.nii.gz"
    if how in ("parent", "absolute"):
        path = "../outside/CASE00_0000.nii.gz" if how == "parent" else str(target)
        edit_json(folder, dataset={"a": {"images": [path], "label": "labelsTr/CASE00.nii.gz"}})
    elif how == "link to a file":
        (folder / "imagesTr/CASE00_0000.nii.gz").unlink()
        (folder / "imagesTr/CASE00_0000.nii.gz").symlink_to(target)
    else:
        shutil.rmtree(folder / "imagesTr")
        (folder / "imagesTr").symlink_to(outside)
    with pytest.raises(InputError, match="outside"):
        read_dataset(folder)


def test_the_folder_itself_may_be_a_link(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert len(read_dataset(tmp_path / "link").cases) == 3


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a\\b"])
def test_names_that_would_write_elsewhere(name: str, folder: Path, edit_json: Callable) -> None:
    entry = {"images": ["imagesTr/CASE01_0000.nii.gz"], "label": "labelsTr/CASE01.nii.gz"}
    edit_json(folder, dataset={name: entry})
    with pytest.raises(InputError, match="cannot name a case"):
        read_dataset(folder)


def test_a_case_listed_twice(folder: Path, edit_json: Callable) -> None:
    decathlon(folder, edit_json)
    entries = json.loads((folder / "dataset.json").read_text())["training"]
    edit_json(folder, training=[*entries, entries[0]])
    with pytest.raises(InputError, match="CASE02 2 times"):
        read_dataset(folder)


def test_scans_to_predict(tmp_path: Path) -> None:
    touch(*(tmp_path / "many" / f"{case}_{c:04d}.nii.gz" for case in ("b", "a") for c in (1, 0)))
    touch(tmp_path / "one/b.nii", tmp_path / "one/a_0001.nii.gz", tmp_path / "one/.a.nii", tmp_path / "one/a.txt")
    touch(tmp_path / "suffixed/b_0000.nii", tmp_path / "suffixed/a_0000.nii.gz")
    cases = list_scans([tmp_path / "many"], channels=2)
    assert [case.name for case in cases] == ["a", "b"]
    assert cases[0].images == (tmp_path / "many/a_0000.nii.gz", tmp_path / "many/a_0001.nii.gz")
    assert cases[0].label is None
    assert [case.name for case in list_scans([tmp_path / "one"], 1)] == ["a_0001", "b"]
    assert [case.name for case in list_scans([tmp_path / "suffixed"], 1)] == ["a", "b"]
    both = [tmp_path / "one/b.nii", tmp_path / "suffixed/a_0000.nii.gz"]
    assert [case.name for case in list_scans(both, 1)] == ["a_0000", "b"]
    # One 4D file per case.
    assert [len(case.images) for case in list_scans([tmp_path / "one/b.nii"], 3)] == [1]


def test_scans_to_predict_that_cannot_be(tmp_path: Path) -> None:
    touch(tmp_path / "gap/a_0000.nii.gz", tmp_path / "gap/a_0002.nii.gz")
    touch(tmp_path / "twice/a.nii", tmp_path / "twice/a.nii.gz", tmp_path / "other/a.nii", tmp_path / "a.mha")
    (tmp_path / "empty").mkdir()
    for files, channels, words in [
        (["gap"], 3, "gap: channel 1 of case a is missing"),
        (["gap"], 2, "missing"),
        (["twice"], 1, "same scan"),
        (["twice/a.nii", "other"], 1, "same scan"),
        (["empty"], 1, "empty: no .nii"),
        (["nowhere"], 1, "nowhere: no such file"),
        (["a.mha"], 1, r"a\.mha: only \.nii"),
        ([], 1, "No scan"),
    ]:
        with pytest.raises(InputError, match=words):
            list_scans([tmp_path / file for file in files], channels)
