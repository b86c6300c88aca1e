"""The scores are what their definitions say, by hand and against an independent implementation."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import surface_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation import metrics
from utnetv2_fast.evaluation.metrics import (
    Evaluation,
    Score,
    count_confusion,
    dice,
    evaluate_files,
    evaluate_folder,
    score_case,
    surface_scores,
)
from utnetv2_fast.ranks import Ranks

# surface-distance 0.1 reaches scipy.ndimage through names that SciPy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")

LABELS = {"background": 0, "left": 1, "right": 2}
Mask = NDArray[np.bool_]


def box(shape: tuple[int, ...], *bounds: tuple[int, int]) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*b) for b in bounds)] = True
    return mask


def distances_by_transform(prediction: Mask, reference: Mask, spacing: tuple[float, ...]) -> tuple[NDArray, NDArray]:
    """Distances from each mask's boundary voxels (those with a face neighbour outside) to the other's, unweighted."""

    def boundary(mask: Mask) -> Mask:
        padded = np.pad(mask, 1)
        return (padded & ~ndimage.binary_erosion(padded))[(slice(1, -1),) * mask.ndim]

    p, r = boundary(prediction), boundary(reference)
    to_p = ndimage.distance_transform_edt(~p, sampling=spacing)
    to_r = ndimage.distance_transform_edt(~r, sampling=spacing)
    return to_r[p], to_p[r]


def random_blobs(seed: int, shape: tuple[int, ...] = (9, 21, 18)) -> tuple[Mask, Mask]:
    rng = np.random.default_rng(seed)
    first = ndimage.gaussian_filter(rng.standard_normal(shape), (1, 3, 3))
    second = first + 0.5 * ndimage.gaussian_filter(rng.standard_normal(shape), (1, 3, 3))
    return first > np.quantile(first, 0.8), second > np.quantile(second, 0.75)


def test_dice_by_hand() -> None:
    p, r = box((4, 4), (0, 2), (0, 3)), box((4, 4), (1, 3), (0, 4))  # 6 and 8 voxels, 3 of them common
    assert dice(p, r) == pytest.approx(2 * 3 / 14)
    assert dice(p, p) == 1
    assert dice(p, ~p) == 0
    assert math.isnan(dice(p & ~p, p & ~p))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_shifted_box_is_as_far_as_it_was_shifted(axis: int, shift: int) -> None:
    spacing = (5.0, 1.5, 0.7)
    # Flat across `axis`, so that nearly all of its surface faces the shift.
    lengths = [14, 14, 14]
    lengths[axis] = 6
    reference = box((24, 24, 24), *((4, 4 + n) for n in lengths))
    prediction = np.roll(reference, shift, axis)
    hd95, nsd = surface_scores(prediction, reference, spacing, tolerance=shift * spacing[axis])
    assert hd95 == pytest.approx(shift * spacing[axis])
    assert nsd == 1
    _, less = surface_scores(prediction, reference, spacing, tolerance=shift * spacing[axis] - 0.01)
    assert less < 1


def test_the_axes_keep_their_own_spacing() -> None:
    reference = box((20, 20, 20), (5, 10), (5, 10), (5, 10))
    far, _ = surface_scores(np.roll(reference, 1, 0), reference, (8.0, 1.0, 1.0))
    near, _ = surface_scores(np.roll(reference, 1, 2), reference, (8.0, 1.0, 1.0))
    assert (far, near) == (8, 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (6.0, 1.2, 0.9)])
def test_hd95_agrees_with_distance_transforms(seed: int, spacing: tuple[float, float, float]) -> None:
    prediction, reference = random_blobs(seed)
    hd95, _ = surface_scores(prediction, reference, spacing)
    outward, back = distances_by_transform(prediction, reference, spacing)
    # Surface elements lie between voxels and are weighted by area: the two definitions differ by less than a voxel.
    assert hd95 == pytest.approx(max(np.percentile(outward, 95), np.percentile(back, 95)), abs=max(spacing))
    assert hd95 <= max(outward.max(), back.max()) + math.hypot(*spacing)


@pytest.mark.parametrize("seed", range(3))
def test_the_definition_is_deepminds(seed: int) -> None:
    prediction, reference = random_blobs(seed)
    hd95, nsd = surface_scores(prediction, reference, (6.0, 1.2, 0.9), tolerance=1.3)
    distances = surface_distance.compute_surface_distances(prediction, reference, (6.0, 1.2, 0.9))
    assert hd95 == surface_distance.compute_robust_hausdorff(distances, 95)
    assert nsd == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(distances, 1.3))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), pad=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)))
def test_scores_are_symmetric_and_blind_to_the_empty_space_around(seed: int, pad: tuple[int, int, int]) -> None:
    prediction, reference = random_blobs(seed, (5, 12, 9))
    spacing = (3.0, 1.0, 2.0)
    scores = surface_scores(prediction, reference, spacing)
    assert scores == pytest.approx(surface_scores(reference, prediction, spacing))
    assert dice(prediction, reference) == dice(reference, prediction)
    around = [(n, m) for n, m in zip(pad, pad[::-1], strict=True)]
    assert surface_scores(np.pad(prediction, around), np.pad(reference, around), spacing) == pytest.approx(scores)
    assert 0 <= scores[1] <= 1
    assert surface_scores(reference, reference, spacing) == (0, 1)


def test_a_spacing_from_a_float32_header_does_not_push_a_surface_out_of_tolerance() -> None:
    reference = box((12, 12, 12), (3, 9), (3, 9), (3, 9))
    _, nsd = surface_scores(np.roll(reference, 1, 0), reference, (1.0000001, 1.0, 1.0), tolerance=1.0)
    assert nsd == 1


def test_the_missing_class_rule() -> None:
    shape, spacing = (4, 10, 20), (8.0, 2.0, 1.0)
    reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    labels = {"background": 0, "both": 1, "missed": 2, "made up": 3, "neither": 4}
    reference[0, :3, :3] = prediction[0, :3, :3] = 1
    reference[1, :3, :3] = 2
    prediction[2, :3, :3] = 3
    both, missed, made_up, neither = score_case("case", prediction, reference, spacing, labels)
    assert (both.dice, both.hd95, both.nsd) == (1, 0, 1)
    diagonal = math.sqrt((4 * 8) ** 2 + (10 * 2) ** 2 + 20**2)
    for score in (missed, made_up):
        assert (score.dice, score.nsd) == (0, 0)
        assert score.hd95 == pytest.approx(diagonal)
    assert (missed.reference_voxels, missed.predicted_voxels) == (9, 0)
    assert (made_up.reference_voxels, made_up.predicted_voxels) == (0, 9)
    assert all(math.isnan(value) for value in (neither.dice, neither.hd95, neither.nsd))


def test_means_leave_out_what_has_no_score() -> None:
    nan = math.nan
    scores = (
        Score("a", "left", 0.5, 2.0, 1.0, 1, 1),
        Score("a", "right", 1.0, 0.0, 1.0, 1, 1),
        Score("b", "left", 0.7, 4.0, 0.5, 1, 1),
        Score("b", "right", nan, nan, nan, 0, 0),
    )
    evaluation = Evaluation(("left", "right", "nowhere"), 1.0, scores)
    left = evaluation.summary("left", "dice")
    assert (left.mean, left.std, left.cases) == (pytest.approx(0.6), pytest.approx(math.sqrt(0.02)), 2)
    right = evaluation.summary("right", "hd95")
    assert (right.mean, right.cases) == (0, 1)
    assert math.isnan(right.std)
    assert evaluation.summary("nowhere", "dice").cases == 0
    assert evaluation.mean("dice") == pytest.approx((0.6 + 1.0) / 2)
    assert math.isnan(Evaluation(("nowhere",), 1.0, ()).mean("dice"))
    assert evaluation.cases == ("a", "b")
    assert evaluation.case_mean("a", "dice") == pytest.approx(0.75)
    assert evaluation.case_mean("b", "hd95") == 4
    assert math.isnan(evaluation.case_mean("c", "dice"))


@pytest.mark.parametrize("classes", [2, 5, 256])
def test_confusion_counts_every_voxel_once(classes: int) -> None:
    reference, prediction = np.random.default_rng(classes).integers(0, classes, (2, 4, 30, 20)).astype(np.uint8)
    expected = np.zeros((classes, classes), np.int64)
    np.add.at(expected, (reference, prediction), 1)
    np.testing.assert_array_equal(count_confusion(prediction, reference, classes), expected)


def test_confusion_of_files_has_the_reference_in_rows_and_sums_over_cases(tmp_path: Path) -> None:
    reference, prediction = np.zeros((2, 6, 5, 4), np.uint8)
    reference[:2], prediction[:2, :3] = 1, 2
    pair = ("c", save(tmp_path / "p.nii.gz", prediction), save(tmp_path / "r.nii.gz", reference))
    assert evaluate_files([pair] * 2, LABELS).confusion == ((160, 0, 0), (32, 0, 48), (0, 0, 0))


def save(file: Path, label: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label, np.diag([2.0, 2.0, 5.0, 1.0]) if affine is None else affine), file)
    return file


def label_map(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 3, (6, 5, 4)).astype(np.uint8)


def test_files_are_scored_with_the_spacing_of_their_own_axes(tmp_path: Path) -> None:
    reference = np.zeros((12, 12, 12), np.uint8)
    reference[3:8, 3:8, 3:8] = 1
    affine = np.diag([1.0, 2.0, 7.0, 1.0])
    for axis, mm in enumerate((1.0, 2.0, 7.0)):
        predicted = save(tmp_path / "p.nii.gz", np.roll(reference, 1, axis), affine)
        [score, _] = evaluate_files([("c", predicted, save(tmp_path / "r.nii.gz", reference, affine))], LABELS).scores
        assert score.hd95 == pytest.approx(mm)


def test_a_prediction_may_be_stored_in_another_orientation(tmp_path: Path) -> None:
    label = label_map()
    affine = np.array([[2.0, 0, 0, -3], [0, 2, 0, 5], [0, 0, 5, 7], [0, 0, 0, 1]])
    flipped = affine.copy()
    flipped[:3, 3] += affine[:3, 0] * (label.shape[0] - 1)
    flipped[:3, 0] *= -1
    pair = ("c", save(tmp_path / "p.nii.gz", label[::-1].copy(), flipped), save(tmp_path / "r.nii.gz", label, affine))
    assert all(score.dice == 1 for score in evaluate_files([pair], LABELS).scores)


def dataset(folder: Path, cases: int = 2) -> Path:
    (folder / "imagesTr").mkdir(parents=True)
    for i in range(cases):
        save(folder / "imagesTr" / f"case{i}_0000.nii.gz", np.ones((6, 5, 4), np.int16))
        save(folder / "labelsTr" / f"case{i}.nii.gz", label_map(i))
    labels = '{"background": 0, "left": 1, "right": 2}'
    (folder / "dataset.json").write_text(
        f'{{"channel_names": {{"0": "MRI"}}, "labels": {labels}, "numTraining": {cases}, "file_ending": ".nii.gz"}}'
    )
    return folder


@pytest.mark.parametrize("references", [".", "labelsTr"])
def test_a_folder_is_scored_against_a_dataset_or_its_labels(tmp_path: Path, references: str) -> None:
    data = dataset(tmp_path / "data")
    for i in range(2):
        save(tmp_path / "predictions" / f"case{i}.nii.gz", label_map(0))
    evaluation = evaluate_folder(tmp_path / "predictions", data / references)
    assert evaluation.labels == ("left", "right")
    assert [(s.case, s.label) for s in evaluation.scores] == [
        (case, label) for case in ("case0", "case1") for label in ("left", "right")
    ]
    assert [s.dice == 1 for s in evaluation.scores] == [True, True, False, False]


def test_a_missing_prediction_is_named_unless_a_subset_is_wanted(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")
    save(tmp_path / "predictions" / "case0.nii.gz", label_map(0))
    with pytest.raises(InputError, match=r"case1\.nii\.gz"):
        evaluate_folder(tmp_path / "predictions", data)
    assert {s.case for s in evaluate_folder(tmp_path / "predictions", data, subset=True).scores} == {"case0"}


def test_what_cannot_be_scored_is_refused_by_name(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", 1)
    predictions = tmp_path / "predictions"
    file = save(predictions / "case0.nii.gz", label_map(0))

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match) as error:
            evaluate_folder(predictions, data)
        assert str(error.value).count("\n") == 0

    save(file, label_map(0), np.diag([2.0, 2.0, 6.0, 1.0]))
    refused(r"predictions/case0\.nii\.gz: its grid differs")
    save(file, label_map(0)[:-1])
    refused(r"predictions/case0\.nii\.gz: its grid differs")
    save(file, label_map(0) + np.uint8(1))
    refused(r"predictions/case0\.nii\.gz: holds the label 3")
    save(file, label_map(0))
    extra = save(predictions / "case7.nii.gz", label_map(0))
    refused(r"case7\.nii\.gz: .* no reference")
    extra.unlink()
    save(predictions / "case0.nii", label_map(0))
    refused("same case")
    (predictions / "case0.nii").unlink()
    save(data / "labelsTr" / "case0.nii.gz", label_map(0) * np.uint8(2))
    refused(r"labelsTr/case0\.nii\.gz: holds the label 4")
    file.write_bytes(file.read_bytes()[:60])
    refused(r"predictions/case0\.nii\.gz: truncated")
    file.unlink()
    refused("predictions: no .nii")
    predictions.rmdir()
    refused("predictions: no such folder")


def test_ranks_share_the_cases_and_all_get_all_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for ranks. What is scored holds until a label map, a class or the tolerance changes."""
    data, predictions, scored = dataset(tmp_path / "data", 3), tmp_path / "predictions", []

    def note_and_score(case: str, *arguments: Any) -> list[Score]:
        scored.append(case)
        return score_case(case, *arguments)

    monkeypatch.setattr(metrics, "score_case", note_and_score)
    for i in range(3):
        save(predictions / f"case{i}.nii.gz", label_map(0))
    (predictions / "case2.nii.gz").write_bytes(save(tmp_path / "empty.nii.gz", 0 * label_map(0)).read_bytes())

    def all_ranks(tolerance: float) -> list[Evaluation]:
        def rank(number: int) -> Evaluation:
            return evaluate_folder(predictions, data, tolerance=tolerance, ranks=Ranks(number, 2, number))

        scored.clear()
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(rank, range(2)))

    for tolerance in (1.0, 2.0):
        alone = evaluate_folder(predictions, data, tolerance=tolerance)
        assert math.isnan(alone.scores[-1].dice) or alone.scores[-1].dice == 0
        for evaluation in all_ranks(tolerance):
            assert repr(evaluation) == repr(alone)  # in which NaN equals NaN
        assert sorted(scored) == ["case0", "case1", "case2"]
        all_ranks(tolerance)
        assert scored == []
    save(predictions / "case1.nii.gz", label_map(1))
    assert repr(all_ranks(1.0)[0]) == repr(evaluate_folder(predictions, data))
    assert scored[0] == "case1"


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_an_impossible_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(InputError, match="tolerance"):
        evaluate_files([], LABELS, tolerance=tolerance)


def test_the_missing_class_rule_of_the_authors() -> None:
    shape, spacing = (4, 10, 20), (400.0, 2.0, 1.0)
    reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    labels = {"background": 0, "far": 1, "missed": 2, "made up": 3, "neither": 4}
    reference[0, :3, :3] = prediction[3, :3, :3] = 1
    reference[1, :3, :3] = 2
    prediction[2, :3, :3] = 3
    far, missed, made_up, neither = score_case("case", prediction, reference, spacing, labels, missing_class="500mm")
    assert (far.dice, far.hd95) == (0, 500)
    assert (missed.dice, missed.hd95, missed.nsd) == (0, 500, 0)
    for score in (made_up, neither):
        assert all(math.isnan(value) for value in (score.dice, score.hd95, score.nsd))
    assert made_up.predicted_voxels == 9
