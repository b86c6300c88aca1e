"""A scan gets its label map on its own grid, wherever it lies, however it is stored, and whoever else's fails."""

from __future__ import annotations

import itertools
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations
from numpy.typing import NDArray
from torch import Tensor, nn

from utnetv2_fast.data.dataset import list_scans
from utnetv2_fast.data.nifti import label_to_native, read_label, read_scan, scan_from_array
from utnetv2_fast.data.plan import IntensityStatistics, Plan
from utnetv2_fast.data.preprocess import preprocess_image
from utnetv2_fast.errors import InputError
from utnetv2_fast.inference import predict as prediction
from utnetv2_fast.inference.predict import Predictor, predict, predict_files
from utnetv2_fast.inference.together import predict_together
from utnetv2_fast.models import UTNetV2
from utnetv2_fast.progress import silent
from utnetv2_fast.ranks import Ranks
from utnetv2_fast.training.recipe import default_training
from utnetv2_fast.training.run_folder import RunConfig, RunFolder

CPU = torch.device("cpu")
STATISTICS = IntensityStatistics(mean=0, std=1, median=0, minimum=-1, maximum=1, percentile_00_5=-1, percentile_99_5=1)


def make_plan(dimensions: int, *, channels: int = 1, axes: tuple[int, int, int] = (0, 1, 2), mm: float = 1.0) -> Plan:
    return Plan(
        dataset="test",
        dimensions=dimensions,
        labels={"background": 0, "left": 1, "right": 2},
        channels=tuple(f"MRI{i}" for i in range(channels)),
        axes=axes,
        spacing=(None if dimensions == 2 else mm, mm, mm),
        median_shape=(16, 16, 16),
        normalisation=("zscore",) * channels,
        intensities=(STATISTICS,) * channels,
    )


class Threshold(nn.Module):
    """Class 2 where the z-scored image exceeds 1, class 1 where it exceeds 0."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1, keepdim=True)
        return torch.cat([-x, x - (x > 1) * 10, (x > 1) * 10 - 9.0], 1)


def threshold_by_hand(image: NDArray[np.generic]) -> NDArray[np.uint8]:
    """What a `Threshold` says, voxel by voxel, without any grid in between."""
    z = (image - image.mean()) / image.std()
    return np.where(z > 1, 2, np.where(z > 0, 1, 0)).astype(np.uint8)


def predictor(model: nn.Module, plan: Plan, patch: int = 16, **options: object) -> Predictor:
    return Predictor([model.eval()], plan, (patch,) * plan.dimensions, CPU, **options)  # type: ignore[arg-type]


def all_planes(segment: Predictor, image: NDArray[np.float32]) -> Tensor:
    """(K, D, H, W)"""
    return torch.stack([plane.clone() for plane in segment.probabilities(image)], 1)


def random_network(dimensions: int, channels: int = 1, seed: int = 0) -> UTNetV2:
    torch.manual_seed(seed)
    return UTNetV2.from_preset(f"tiny-{dimensions}d", in_channels=channels, num_classes=3).eval()


def structured_image(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.int16]:
    """Smooth enough to survive resampling, without any symmetry."""
    rng = np.random.default_rng(seed)
    waves = [np.sin(np.arange(n) * rng.uniform(0.2, 0.9) + rng.uniform(0, 6)) for n in shape]
    image = sum(
        np.moveaxis(np.broadcast_to(w, (*shape[:i], *shape[i + 1 :], len(w))), -1, i) for i, w in enumerate(waves)
    )
    return (image * 100 + rng.normal(0, 20, shape) + 300).astype(np.int16)


def affine_of(
    spacing: tuple[float, float, float], degrees: tuple[float, float, float] = (0, 0, 0)
) -> NDArray[np.float64]:
    rotation = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        rotation = turn @ rotation
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = -31.5, 12.25, 7
    return affine


def write_scan(file: Path, image: NDArray[np.generic], affine: NDArray[np.float64]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image, affine), file)
    return file


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("shape", [(20, 33, 7), (16, 16, 16), (5, 9, 40)])
def test_a_voxelwise_network_labels_every_voxel_where_it_lies(
    dimensions: int, axes: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    image = structured_image(shape)
    scan = scan_from_array(image, affine_of((1, 1, 1)))
    label = predictor(Threshold(), make_plan(dimensions, axes=axes), batch_size=3)(scan)
    assert label.dtype == np.uint8
    assert label.shape == scan.image.shape[1:]
    np.testing.assert_array_equal(label_to_native(label, scan.grid), threshold_by_hand(image))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_oblique_slices_are_predicted_whichever_way_they_lie(
    dimensions: int, short_axis_affines: list[NDArray[np.float64]]
) -> None:
    """Resampled in their own plane, not across it: the label maps are the same voxel by voxel."""
    image = structured_image((23, 18, 6))
    plan = make_plan(dimensions, mm=2.0).model_copy(
        update={"slices_first": True, "spacing": (None if dimensions == 2 else 4.5, 2.0, 2.0)}
    )
    labels = []
    for affine in short_axis_affines:
        scan = scan_from_array(image, affine)
        labels.append(label_to_native(predictor(Threshold(), plan)(scan), scan.grid))
    assert (labels[0] == threshold_by_hand(image)).mean() > 0.7
    np.testing.assert_array_equal(labels[1], labels[0])
    np.testing.assert_array_equal(labels[2], labels[0])


@pytest.mark.parametrize("dimensions", [2, 3])
def test_zeros_around_the_body_are_cropped_and_come_back_as_background(dimensions: int) -> None:
    body = structured_image((14, 18, 9))
    image = np.zeros((30, 30, 15), np.int16)
    image[3:17, 10:28, 2:11] = body
    scan = scan_from_array(image, affine_of((1, 1, 1)))
    label = label_to_native(predictor(Threshold(), make_plan(dimensions))(scan), scan.grid)
    np.testing.assert_array_equal(label[3:17, 10:28, 2:11], threshold_by_hand(body))
    assert np.count_nonzero(label) == np.count_nonzero(threshold_by_hand(body))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_way_to_store_a_scan_gives_the_same_segmentation_in_its_own_grid(dimensions: int, tmp_path: Path) -> None:
    image = structured_image((20, 26, 10))
    affine = affine_of((1.3, 0.9, 4.0), (12, -8, 20))  # oblique
    segment = predictor(random_network(dimensions), make_plan(dimensions), patch=32)
    reference = read_scan([write_scan(tmp_path / "reference.nii.gz", image, affine)])
    expected = label_to_native(segment(reference), reference.grid)
    assert len(np.unique(expected)) == 3, "the network must draw something"
    for permutation in itertools.permutations(range(3)):
        for signs in [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)]:
            stored = np.array(list(zip(permutation, signs, strict=True)))
            copy = orientations.apply_orientation(image, stored)
            copy_affine = affine @ orientations.inv_ornt_aff(stored, image.shape)
            case = write_scan(tmp_path / "scans" / "copy.nii.gz", copy, copy_affine)
            [file], _ = predict_files(segment, list_scans([case], 1), tmp_path / "out", overwrite=True)
            predicted = nib.load(file)
            assert predicted.get_data_dtype() == np.uint8
            np.testing.assert_allclose(predicted.affine, copy_affine, atol=1e-5)
            np.testing.assert_array_equal(
                np.asarray(predicted.dataobj), orientations.apply_orientation(expected, stored)
            )


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_scan_turned_in_space_keeps_its_segmentation(dimensions: int) -> None:
    image = structured_image((20, 26, 10))
    segment = predictor(random_network(dimensions), make_plan(dimensions), patch=32)
    straight, oblique = (
        scan_from_array(image, affine_of((1.3, 0.9, 4.0), degrees)) for degrees in [(0, 0, 0), (12, -8, 20)]
    )
    np.testing.assert_array_equal(segment(straight), segment(oblique))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_neither_the_batch_size_nor_one_window_more_changes_a_voxelwise_answer(dimensions: int) -> None:
    scan = scan_from_array(structured_image((40, 37, 21)), affine_of((1, 1, 1)))
    answers = [
        predictor(Threshold(), make_plan(dimensions), patch, batch_size=size, weighting=weighting, mirror=mirror)(scan)
        for patch, size, weighting, mirror in [
            (16, 1, "gaussian", False),
            (16, 7, "gaussian", True),
            (12, None, "uniform", False),
            (64, None, "gaussian", False),
        ]
    ]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


@pytest.mark.parametrize("dimensions", [2, 3])
def test_several_networks_average_their_probabilities(dimensions: int) -> None:
    image = torch.randn(1, 9, 20, 18).numpy()
    networks = [random_network(dimensions, seed=seed) for seed in range(3)]
    plan = make_plan(dimensions)
    singles = [all_planes(predictor(network, plan), image) for network in networks]
    together = all_planes(replace(predictor(networks[0], plan), models=networks), image)
    assert together.shape == (3, 9, 20, 18)
    torch.testing.assert_close(together, sum(singles) / 3, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.sum(0), torch.ones(9, 20, 18), atol=1e-5, rtol=0)


def test_half_precision_is_near_float32() -> None:
    image = torch.randn(1, 32, 32, 32).numpy()
    network = random_network(3)
    exact = all_planes(predictor(network, make_plan(3), 32), image)
    half = all_planes(predictor(network, make_plan(3), 32, autocast=torch.bfloat16), image)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    # Not voxel by voxel: an untrained network amplifies rounding.
    assert (half - exact).abs().mean() < 0.02


@pytest.mark.parametrize("dimensions", [2, 3])
def test_scans_are_segmented_alike_on_every_device(dimensions: int, device: torch.device) -> None:
    scan = scan_from_array(structured_image((40, 37, 21)), affine_of((1, 1, 1)))
    on_cpu = predictor(Threshold(), make_plan(dimensions))
    on_device = replace(on_cpu, models=[Threshold().eval().to(device)], device=device)
    image, _ = preprocess_image(scan, on_cpu.plan)
    assert next(on_device.probabilities(image)).device.type == device.type
    np.testing.assert_array_equal(on_device(scan), on_cpu(scan))


def test_a_network_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        Predictor([Threshold().train()], make_plan(3), (16, 16, 16), CPU)


def scans_in(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        write_scan(folder / name, structured_image((12, 11, 6), seed), affine_of((1, 1, 1)))
    return folder


def test_a_damaged_scan_is_named_after_the_others_are_done(tmp_path: Path) -> None:
    scans = scans_in(tmp_path / "scans", ["a.nii.gz", "b.nii.gz", "c.nii.gz"])
    damaged = scans / "b.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(InputError, match=r"1 of 3 .*b\.nii\.gz") as error:
        predict_files(predictor(Threshold(), make_plan(3)), list_scans([scans], 1), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    np.testing.assert_array_equal(
        np.asarray(nib.load(tmp_path / "out" / "c.nii.gz").dataobj), threshold_by_hand(structured_image((12, 11, 6), 2))
    )


def test_ranks_share_the_scans_and_name_those_that_fail(tmp_path: Path) -> None:
    """Threads stand for ranks; a scan that one of them is the first to fail on, the others fail on too."""
    names = [f"{i}.nii.gz" for i in range(7)]
    scans, segment = scans_in(tmp_path / "scans", names), predictor(Threshold(), make_plan(3))
    cases = list_scans([scans], 1)
    alone, _ = predict_files(segment, cases, tmp_path / "alone")

    def all_ranks() -> list[list[Path] | str]:
        def rank(number: int) -> list[Path] | str:
            try:
                written, kept = predict_together(segment, cases, tmp_path / "out", silent, Ranks(number, 3, number))
                return sorted([*written, *kept])
            except InputError as error:
                return str(error)

        with ThreadPoolExecutor(3) as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the scan that is tried again
            return list(pool.map(rank, range(3)))

    (whole := scans / "4.nii.gz").rename(tmp_path / "whole.nii.gz")
    whole.write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:200])
    for said in all_ranks():
        assert isinstance(said, str)
        assert said.startswith("1 of 7 scans could not be predicted")
        assert "4.nii.gz" in said
    (tmp_path / "whole.nii.gz").rename(whole)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert len(times) == 6
    assert all_ranks() == [[tmp_path / "out" / name for name in names]] * 3
    assert {file: file.stat().st_mtime_ns for file in times} == times, "what was done is left alone"
    for file in alone:
        np.testing.assert_array_equal(read_label(tmp_path / "out" / file.name)[0], read_label(file)[0])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names


def test_inputs_are_never_replaced_and_results_only_on_demand(tmp_path: Path) -> None:
    scans = scans_in(tmp_path / "scans", ["a.nii.gz", "b.nii.gz"])
    segment = predictor(Threshold(), make_plan(3))
    before = {file.name: file.read_bytes() for file in scans.iterdir()}
    (tmp_path / "link").symlink_to(scans)
    for folder in (scans, tmp_path / "link", scans / ".." / "scans"):
        with pytest.raises(InputError, match=r"a\.nii\.gz: the prediction would replace"):
            predict_files(segment, list_scans([scans], 1), folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in scans.iterdir()} == before

    with pytest.raises(InputError, match=r"scans/a\.nii\.gz: a file"):
        predict_files(segment, list_scans([scans], 1), scans / "a.nii.gz")

    first = predict_files(segment, list_scans([scans / "b.nii.gz"], 1), tmp_path / "out")
    assert first == ([tmp_path / "out" / "b.nii.gz"], [])
    with pytest.raises(InputError, match=r"out/b\.nii\.gz: exists already"):
        predict_files(segment, list_scans([scans], 1), tmp_path / "out")
    assert not (tmp_path / "out" / "a.nii.gz").exists(), "refused before anything is written"
    written, kept = predict_files(segment, list_scans([scans], 1), tmp_path / "out", overwrite=True)
    assert (len(written), len(kept)) == (2, 0)


def test_two_channels_are_two_files_or_one_with_two_volumes(tmp_path: Path) -> None:
    images = [structured_image((12, 11, 6), seed) for seed in range(2)]
    for i, image in enumerate(images):
        write_scan(tmp_path / "files" / f"case_{i:04d}.nii.gz", image, affine_of((1, 1, 1)))
    write_scan(tmp_path / "volumes" / "case.nii.gz", np.stack(images, -1), affine_of((1, 1, 1)))
    segment = predictor(random_network(3, channels=2), make_plan(3, channels=2))
    labels = [
        read_label(predict_files(segment, list_scans([tmp_path / name], 2), tmp_path / "out" / name)[0][0])[0]
        for name in ("files", "volumes")
    ]
    np.testing.assert_array_equal(*labels)

    write_scan(tmp_path / "one" / "case.nii.gz", images[0], affine_of((1, 1, 1)))
    with pytest.raises(InputError, match=r"^\S*one/case\.nii\.gz: 1 of 2 channels"):
        predict_files(segment, list_scans([tmp_path / "one"], 2), tmp_path / "out")


def test_what_an_earlier_prediction_completed_is_kept(tmp_path: Path) -> None:
    scans, out = scans_in(tmp_path / "scans", ["a.nii.gz", "b.nii.gz", "c.nii.gz"]), tmp_path / "out"
    run = write_run(tmp_path / "run", random_network(3), make_plan(3))

    def predict_again(*runs: Path, overwrite: bool = False, **options: object) -> tuple[list[str], list[str]]:
        segment = Predictor.load(runs or [run], device="cpu", **options)  # type: ignore[arg-type]
        written, kept = predict_files(segment, list_scans([scans], 1), out, overwrite=overwrite)
        return [file.name[0] for file in written], [file.name[0] for file in kept]

    assert predict_again() == (["a", "b", "c"], [])
    first = (out / "a.nii.gz").read_bytes()
    (out / "b.nii.gz").unlink()
    assert predict_again() == (["b"], ["a", "c"])
    assert predict_again(batch_size=2) == ([], ["a", "b", "c"]), "how many windows share a batch is no matter"
    assert predict_again(overwrite=True) == (["a", "b", "c"], [])

    for options in ({"mirror": True}, {"weighting": "uniform"}):
        with pytest.raises(InputError, match=r"out/a\.nii\.gz: exists already"):
            predict_again(**options)
    other = write_run(tmp_path / "other", random_network(3, seed=1), make_plan(3))
    with pytest.raises(InputError, match=r"out/a\.nii\.gz: exists already"):
        predict_again(other)
    shutil.copytree(run, tmp_path / "moved")
    assert predict_again(tmp_path / "moved") == ([], ["a", "b", "c"]), "the same weights, wherever they lie"

    write_scan(scans / "b.nii.gz", structured_image((12, 11, 6), 7), affine_of((1, 1, 1)))
    with pytest.raises(InputError, match=r"out/b\.nii\.gz: exists already"):
        predict_again()
    (out / "b.nii.gz").write_bytes(first[:100])  # not one of ours, by its look
    with pytest.raises(InputError, match=r"out/b\.nii\.gz: exists already"):
        predict_again()
    assert (out / "a.nii.gz").read_bytes() == first


def test_a_label_map_appears_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, out = scans_in(tmp_path / "scans", ["a.nii.gz", "b.nii.gz"]), tmp_path / "out"
    segment = replace(predictor(Threshold(), make_plan(3)), identity="x")
    save = nib.save

    def die_over_b(image: object, file: Path) -> None:
        save(image, file)
        if "b." in Path(file).name:
            Path(file).write_bytes(Path(file).read_bytes()[:200])
            raise KeyboardInterrupt

    monkeypatch.setattr(nib, "save", die_over_b)
    with pytest.raises(KeyboardInterrupt):
        predict_files(segment, list_scans([scans], 1), out)
    assert [file.name for file in out.iterdir()] == ["a.nii.gz"]
    monkeypatch.undo()
    assert predict_files(segment, list_scans([scans], 1), out) == ([out / "b.nii.gz"], [out / "a.nii.gz"])


def write_run(folder: Path, network: UTNetV2, plan: Plan) -> Path:
    run = RunFolder(folder)
    preset = f"tiny-{plan.dimensions}d"
    run.write_config(
        RunConfig(
            preset=preset,
            data="data",
            prepared="prepared",
            fold=0,
            train_cases=("a",),
            held_out_cases=("b",),
            plan=plan,
            patch_size=(32,) * plan.dimensions,
            model=network.config,
            training=default_training(preset),
        )
    )
    run.save_weights("last", network.state_dict())
    return folder


@pytest.mark.parametrize("dimensions", [2, 3])
def test_predict_takes_files_and_arrays_and_answers_in_their_own_axes(dimensions: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_network(dimensions), make_plan(dimensions))
    image, affine = structured_image((20, 26, 10)), affine_of((1.3, 0.9, 4.0), (12, -8, 20))
    stored = np.array([[2, -1], [0, 1], [1, -1]])  # slices first, two axes flipped
    image, affine = (
        orientations.apply_orientation(image, stored),
        affine @ orientations.inv_ornt_aff(stored, image.shape),
    )
    file = write_scan(tmp_path / "scan.nii", image, affine)
    loaded = nib.load(file)
    label = predict(run, file, device="cpu")
    assert (label.dtype, label.shape) == (np.uint8, image.shape)
    assert len(np.unique(label)) == 3
    np.testing.assert_array_equal(predict(str(run), [str(file)], device="cpu"), label)
    np.testing.assert_array_equal(predict(run, np.asarray(loaded.dataobj), loaded.affine, device="cpu"), label)
    np.testing.assert_array_equal(predict([run], image[None], loaded.affine, device="cpu"), label)
    np.testing.assert_array_equal(predict([run, run], file, device="cpu"), label)
    [written], _ = predict_files(Predictor.load([run], device="cpu"), list_scans([file], 1), tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(nib.load(written).dataobj), label)


def test_predict_needs_an_affine_with_an_array_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_network(3), make_plan(3))
    with pytest.raises(TypeError, match="affine"):
        predict(run, np.zeros((4, 4, 4)))
    with pytest.raises(TypeError, match="affine"):
        predict(run, tmp_path / "scan.nii", np.eye(4))
    with pytest.raises(InputError, match=r"2 channels, .* trained on MRI0"):
        predict(run, np.zeros((2, 4, 4, 4)), np.eye(4), device="cpu")


def test_runs_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_network(3), make_plan(3))
    with pytest.raises(InputError, match="nowhere"):
        Predictor.load([tmp_path / "nowhere"], device="cpu")
    with pytest.raises(InputError, match="best"):
        Predictor.load([run], weights="best", device="cpu")
    with pytest.raises(InputError, match="No run"):
        Predictor.load([], device="cpu")
    other = write_run(tmp_path / "other", random_network(3), make_plan(3, mm=2.0))
    with pytest.raises(InputError, match=r"other: .* differ from those of .*run"):
        Predictor.load([run, other], device="cpu")
    two_channels = write_run(tmp_path / "two", random_network(3, channels=2), make_plan(3))
    with pytest.raises(InputError, match=r"two/config\.yaml: the network has other"):
        Predictor.load([two_channels], device="cpu")


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_kernels_are_checked_in_the_dtype_and_shapes_of_the_prediction(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(prediction, "check_kernels", lambda *arguments: checked.append(arguments))
    monkeypatch.setattr(prediction, "autocast_dtype", lambda device: torch.bfloat16)
    run = write_run(tmp_path / "run", random_network(2), make_plan(2))
    config = RunFolder(run).config
    training = config.training.model_copy(update={"precision": precision})
    RunFolder(run).write_config(config.model_copy(update={"training": training}))
    predictor = Predictor.load([run], device="cpu", batch_size=3)
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    assert checked == [(predictor.models[0], (3, 1, *config.patch_size), CPU, dtype)]
