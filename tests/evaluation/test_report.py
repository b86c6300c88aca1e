"""The page says what the scores say, shows hostile names as text, needs nothing outside itself, and bears gaps."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from utnetv2_fast.data.dataset import Dataset, read_dataset
from utnetv2_fast.evaluation.metrics import Evaluation, Score, evaluate_files, evaluate_folder
from utnetv2_fast.evaluation.report import (
    CaseFiles,
    PicturedCase,
    Report,
    Training,
    duration,
    picture_cases,
    rank_cases,
    render,
    report_on_folder,
)
from utnetv2_fast.evaluation.tables import summarise

# surface-distance 0.1 reaches scipy.ndimage through names that SciPy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")

HOSTILE = """<script>alert("1")</script> & 'x' $\\frac$ {{ 7 * 7 }}"""
NAN = math.nan
PNG = base64.b64decode("iVBORw0KGgo=")


def score(case: str, label: str, dice: float, hd95: float = 2.0) -> Score:
    if math.isnan(dice):
        return Score(case, label, NAN, NAN, NAN, 0, 0)
    return Score(case, label, dice, hd95, dice, 100, 90)


EVALUATION = Evaluation(
    ("RV", "LV"),
    1.5,
    (
        *(score("a", "RV", 0.8123), score("a", "LV", 0.9876, 1.25)),
        *(score("b", "RV", NAN), score("b", "LV", 0.5)),
        *(score("c", "RV", 0.71), score("c", "LV", 0.7, 7.125)),
    ),
    ((1000, 10, 0), (30, 60, 10), (0, 0, 0)),
)
TRAINING = Training(
    records=[{"epoch": 0, "step": 40, "loss": 0.5, "dice": 0.7, "seconds": 12.0}],
    epochs=3,
    settings={"Network": "tiny-2d"},
    configuration="preset: tiny-2d",
    environments=[{"command": ["train", "--out", "a b"], "packages": {"torch": "2.13", "triton": None}}],
    resources={"peak_memory_bytes": 3 * 2**30},
)


class Page(HTMLParser):
    """Text of the body, tables as rows of cells, tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "title" in self._open or not data.strip():
            return
        self.texts.append(" ".join(data.split()))
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {self.texts[-1]}".strip()

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row[0] == first)


def test_scores_are_those_of_scores_json() -> None:
    page = Page(render(Report("run", "", "clean", evaluation=EVALUATION)))
    summary = json.loads(json.dumps(summarise(EVALUATION)))
    for label in EVALUATION.labels:
        values = summary["classes"][label]
        dice, hd95, nsd = values["dice"], values["hd95_mm"], values["nsd"]
        assert page.row(label) == [
            label,
            f"{dice['mean']:.3f} ± {dice['std']:.3f}",
            f"{hd95['mean']:.2f} ± {hd95['std']:.2f}",
            f"{nsd['mean']:.3f} ± {nsd['std']:.3f}",
            str(dice["cases"]),
        ]
    mean = summary["mean"]
    assert page.row("Mean") == ["Mean", f"{mean['dice']:.3f}", f"{mean['hd95_mm']:.2f}", f"{mean['nsd']:.3f}", "3"]
    assert "NSD (1.5 mm)" in page.row("Class")
    assert page.row("b") == ["b", "0.500", "–", "0.500", "2.00"]  # noqa: RUF001
    assert [row[0] for row in page.rows if row and row[0] in "abc"] == ["b", "c", "a"]


def test_confusion_is_normalised_by_row() -> None:
    page = Page(render(Report("run", "", "clean", evaluation=EVALUATION)))
    first = page.rows.index(["Reference", "background", "RV", "LV"])
    assert page.rows[first + 1 :] == [
        ["background", "99.0 1 000", "1.0 10", "0.0 0"],
        ["RV", "30.0 30", "60.0 60", "10.0 10"],
        ["LV", "– 0", "– 0", "– 0"],  # noqa: RUF001
    ]
    assert "Confusion" not in render(Report("run", "", "clean", evaluation=replace(EVALUATION, confusion=())))


@pytest.mark.parametrize(
    ("protocol", "leaks", "first"),
    [
        ("clean", (), "Protocol: clean."),
        ("paper", ("best-on-test", "label-crop"), "Protocol: paper, with leaks: best-on-test, label-crop."),
        (None, (), "Protocol: not recorded."),
        ("other", (), "Protocol: other."),
    ],
)
def test_the_first_line_says_the_protocol_and_its_leaks(
    protocol: str | None, leaks: tuple[str, ...], first: str
) -> None:
    page = Page(render(Report("run", "", protocol, leaks, evaluation=EVALUATION)))
    assert page.texts[0] == first


def everything(name: str) -> Report:
    """A report with `name` wherever a name of the user's can appear."""
    labels = (name, "LV")
    scores = [replace(s, case=name + s.case, label=labels[s.label == "LV"]) for s in EVALUATION.scores]
    return Report(
        title=name,
        subtitle=name,
        protocol=name,
        leaks=(name,),
        training=replace(
            TRAINING,
            settings={name: name},
            configuration=name,
            environments=[{name: name, "command": [name], "packages": {name: name}}],
            curves=PNG,
            patches=PNG,
        ),
        evaluation=Evaluation(labels, 1.0, tuple(scores), EVALUATION.confusion),
        scores_figure=PNG,
        cases=[PicturedCase("worst", name + "a", PNG, name, 0.001)],
    )


def test_hostile_names_are_text() -> None:
    harmless, hostile = Page(render(everything("name"))), Page(render(everything(HOSTILE)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [set(attributes) for _, attributes in hostile.tags] == [set(attributes) for _, attributes in harmless.tags]
    assert " ".join(hostile.texts).count(HOSTILE) >= 15
    assert hostile.row(HOSTILE)[0] == HOSTILE


def test_the_page_needs_nothing_outside_itself() -> None:
    html = render(everything("name"))
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "a", "form"}
    )
    sources = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "srcset")]
    assert len(sources) == 4
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html))
    assert not any(key.startswith("on") or key == "href" for _, attributes in page.tags for key in attributes)


def test_a_run_without_a_finished_epoch_says_so() -> None:
    empty = replace(TRAINING, records=[], environments=[], resources={})
    page = Page(render(Report("run", "", "clean", training=empty)))
    text = " ".join(page.texts)
    assert "0 of 3 epochs are finished. There are no scores yet" in text
    assert "No epoch has finished yet, so there are no curves." in text
    assert page.row("Training") == ["Training", "not recorded"]
    assert page.row("Largest memory") == ["Largest memory", "not recorded"]
    assert "Not recorded." in page.texts
    assert not any(tag == "img" for tag, _ in page.tags)


def test_time_and_memory_of_a_run() -> None:
    training = replace(TRAINING, resources=TRAINING.resources | {"prediction_seconds": 6.0})
    page = Page(render(Report("run", "", "clean", training=training, evaluation=EVALUATION)))
    assert page.row("Epochs") == ["Epochs", "1 of 3"]
    assert page.row("Training") == ["Training", "12.0 s"]
    assert page.row("Training, per step") == ["Training, per step", "300 ms"]
    assert page.row("Prediction") == ["Prediction", "6.0 s"]
    assert page.row("Prediction, per case") == ["Prediction, per case", "2.0 s"]
    assert page.row("Scoring") == ["Scoring", "not recorded"]
    assert page.row("Largest memory") == ["Largest memory", "3.00 GiB"]
    assert page.row("Command") == ["Command", "train --out 'a b'"]
    assert page.row("Packages") == ["Packages", "torch 2.13"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0304, "30 ms"), (0.9999, "1.0 s"), (59.97, "1 min 00 s"), (3599.6, "1 h 00 min"), (90061, "25 h 01 min")],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_cases_are_ranked_by_their_mean_dice() -> None:
    assert rank_cases(EVALUATION) == [("worst", "b"), ("median", "c"), ("best", "a")]
    two = replace(EVALUATION, scores=EVALUATION.scores[:4])
    assert rank_cases(two) == [("worst", "b"), ("best", "a")]
    assert rank_cases(replace(EVALUATION, scores=EVALUATION.scores[:2])) == [("only", "a")]
    unscored = Evaluation(("RV",), 1.0, (score("a", "RV", NAN), score("b", "RV", NAN)))
    assert rank_cases(unscored) == []
    text = " ".join(Page(render(Report("run", "", "clean", evaluation=unscored))).texts)
    assert "No case has a class to score" in text
    assert "In no case, neither in reference nor in prediction: RV." in text


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two scans of 2 x 2 x 8 mm; the second lacks class 2."""
    folder = tmp_path / "data"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    affine = np.diag([2.0, 2.0, 8.0, 1.0])
    for index in range(2):
        label = np.zeros((20, 16, 5), np.uint8)
        label[4:12, 5:11, 1:4] = 1
        label[6:9, 6:9, 2] = 2 - index
        image = (label + rng.normal(0, 0.1, label.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / f"case{index}.nii.gz")
        nib.save(nib.Nifti1Image(image, affine), folder / "imagesTr" / f"case{index}_0000.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, HOSTILE: 1, "LV": 2}}
    (folder / "dataset.json").write_text(json.dumps(content))
    return read_dataset(folder)


def test_label_maps_get_a_page_with_their_cases(dataset: Dataset) -> None:
    predictions = dataset.folder / "labelsTr"
    report = report_on_folder(evaluate_folder(predictions, dataset.folder), predictions, dataset.folder)
    assert [case.rank for case in report.cases] == ["worst", "best"]
    assert all(case.picture and case.picture.startswith(PNG) for case in report.cases)
    page = Page(render(report))
    assert page.row(HOSTILE) == [HOSTILE, "1.000 ± 0.000", "0.00 ± 0.00", "1.000 ± 0.000", "2"]
    assert ["LV", "absent from both"] in page.rows
    # 8 x 6 x 3 voxels, of which 9 are of the other class, of 0.032 ml each
    assert [HOSTILE, "1.000", "0.00", "4.3", "4.3"] in page.rows
    assert "CT, window -160 to 240 HU." in page.texts


def test_what_cannot_be_drawn_leaves_a_remark(dataset: Dataset, tmp_path: Path) -> None:
    case, other = dataset.cases
    assert case.label is not None
    evaluation = evaluate_files([(case.name, case.label, case.label)], dataset.labels)

    def remark(files: CaseFiles) -> tuple[str, bool]:
        [pictured] = picture_cases(evaluation, {case.name: files}, dataset.channels)
        return pictured.remark, pictured.picture is not None

    files = CaseFiles(case.images, case.label, case.label)
    shifted = tmp_path / "shifted.nii.gz"
    image = nib.load(case.images[0])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([2.0, 2.0, 9.0, 1.0])), shifted)
    text, drawn = remark(replace(files, images=(shifted,)))
    assert "grid" in text
    assert drawn
    text, drawn = remark(replace(files, images=()))
    assert "not in the dataset" in text
    assert drawn
    other.images[0].write_bytes(b"")
    text, drawn = remark(replace(files, images=other.images))
    assert "cannot be shown" in text
    assert drawn
    text, drawn = remark(replace(files, prediction=tmp_path / "gone.nii.gz"))
    assert "gone.nii.gz" in text
    assert not drawn
