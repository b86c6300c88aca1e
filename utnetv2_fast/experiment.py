"""The whole work on one fold: configure, train, predict the held-out scans on their own grids, score them."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utnetv2_fast.data.dataset import Dataset
from utnetv2_fast.data.nifti import read_scan
from utnetv2_fast.data.plan import PatchPlan, plan_patch
from utnetv2_fast.data.prepare import Prepared
from utnetv2_fast.data.resample import ANISOTROPY_THRESHOLD
from utnetv2_fast.data.splits import load_or_make_splits, splits_file, take_patients
from utnetv2_fast.errors import InputError
from utnetv2_fast.evaluation.metrics import Evaluation, evaluate_files
from utnetv2_fast.evaluation.tables import summarise, write_tables
from utnetv2_fast.files import write_text_atomically
from utnetv2_fast.inference.held_out import predict_held_out, scored_files
from utnetv2_fast.inference.predict import Predictor
from utnetv2_fast.memory import forget_peak_memory, peak_memory
from utnetv2_fast.models import Preset, check_pretrained, configure_network, get_preset
from utnetv2_fast.progress import Track, silent
from utnetv2_fast.ranks import ALONE, Ranks
from utnetv2_fast.run_report import complete_report, follow_training
from utnetv2_fast.sharing import in_order, share
from utnetv2_fast.training import Recipe, RunConfig, RunFolder, train
from utnetv2_fast.training.loop import Progress, ignore_epoch, ignore_progress, never, training_dtype
from utnetv2_fast.training.parallel import wait_for_all
from utnetv2_fast.training.run_folder import find_runs


def suggest_preset(dataset: Dataset, device: torch.device) -> str:
    """A preset for a dataset: 2D where slices are thick, else 3D; the paper's size on a GPU, the small one elsewhere.

    The first scans of the dataset decide.
    """
    scans = (read_scan(case.images, len(dataset.channels)) for case in dataset.cases[:5])
    # Sorted: short-axis slices of the heart lie otherwise in every scan.
    finest, _, coarsest = np.median([sorted(scan.grid.spacing) for scan in scans], axis=0)
    thick = coarsest > ANISOTROPY_THRESHOLD * finest
    if device.type == "cuda":
        return "acdc-2d" if thick else "lits-3d"
    return "tiny-2d" if thick else "tiny-3d"


def configure(
    prepared: Prepared,
    data: Path,
    recipe: Recipe,
    fold: int,
    *,
    share: float = 1.0,
    pretrained: Path | None = None,
) -> RunConfig:
    """The configuration of a run: the recipe's network fitted to the data, and its settings.

    The cases of the fold become part of it, of those to train on the ones of a share of their patients: what was
    trained on stays out of the scores whatever becomes of the splits. The weights in the file `pretrained` are loaded
    when the training begins. Raises InputError when there is no such fold or file, and where the network takes none.
    """
    preset, plan = get_preset(recipe.preset), prepared.plan
    if pretrained is not None:
        check_pretrained(recipe.network, pretrained)
    splits = load_or_make_splits(prepared, recipe.split)
    if not 0 <= fold < len(splits):
        raise InputError(f"There is no fold {fold}: {splits_file(prepared, recipe.split)} has 0 to {len(splits) - 1}.")
    patients = {case.name: case.patient for case in prepared.cases}
    patch = _patch(prepared, preset, recipe.patch_size)
    task = preset.task(len(plan.channels), plan.num_classes, patch.patch_size)
    task = task._replace(scales=patch.scales, kernel_sizes=patch.kernel_sizes)
    return RunConfig(
        protocol=recipe.protocol,
        preset=recipe.preset,
        network=recipe.network,
        data=str(data.resolve()),
        prepared=str(prepared.folder.resolve()),
        fold=fold,
        share_of_patients=share,
        train_cases=tuple(take_patients(splits[fold]["train"], patients, share)),
        held_out_cases=tuple(splits[fold]["val"]),
        preparation=recipe.preparation,
        plan=plan,
        patch_size=patch.patch_size,
        # The paper's networks have published sizes; beside a small one all are made as small.
        model=configure_network(recipe.network, task, equal_parameters=preset.fits_data),
        pretrained=None if pretrained is None else str(pretrained.resolve()),
        training=recipe.training,
        evaluation=recipe.evaluation,
    )


def _patch(prepared: Prepared, preset: Preset, patch_size: tuple[int, ...] | None) -> PatchPlan:
    """By nnU-Net's rules for a preset that fits the data, else the size given or the preset's, as the data need."""
    wanted = patch_size or preset.input_size
    if preset.fits_data:
        return plan_patch(prepared.plan, wanted)
    scales, kernel_sizes = preset.fields["scales"], preset.fields["kernel_sizes"]
    stride = np.prod(scales, axis=0)
    median = np.array(prepared.plan.median_shape[-preset.dimensions :])
    covering = -(-median // stride) * stride
    patch = np.minimum(wanted, covering)
    return PatchPlan(patch_size=tuple(patch.tolist()), scales=scales, kernel_sizes=kernel_sizes)


def new_runs(
    prepared: Prepared,
    data: Path,
    recipe: Recipe,
    folds: Sequence[int] | None,
    out: Path,
    *,
    pretrained: Path | None = None,
) -> list[tuple[RunFolder, RunConfig]]:
    """The configurations of runs to begin: of one fold in `out`, of several or (None) all in `out/fold-K`.

    Nothing is written yet. Raises InputError for what `configure` refuses.
    """
    if folds is None:
        folds = range(len(load_or_make_splits(prepared, recipe.split)))
    alone = len(folds) == 1
    return [
        (
            RunFolder(out if alone else out / f"fold-{fold}"),
            configure(prepared, data, recipe, fold, pretrained=pretrained),
        )
        for fold in folds
    ]


def refuse_existing_runs(out: Path) -> None:
    """Raises InputError when `out` is a file, or holds a run that was begun; one that was only set up is no loss."""
    if begun := [run for run in find_runs(out) if run.begun]:
        raise InputError(f"{begun[0].path}: holds a run already; go on with it by --resume, or name another --out.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder as --out.")


def existing_runs(out: Path) -> list[RunFolder]:
    """The run in `out`, or the runs of the folds in it.

    Raises InputError when there are none, or when they were stopped while they were set up: some may be missing.
    """
    runs = find_runs(out)
    if not runs:
        raise InputError(f"{out}: holds no run to resume; name the --out of an earlier training.")
    if not any(run.begun for run in runs):
        raise InputError(f"{out}: its training was never begun; start it anew without --resume.")
    return runs


def run_fold(
    run: RunFolder,
    dataset: Dataset,
    prepared: Prepared,
    device: torch.device,
    *,
    watch: Callable[[Progress], None] = ignore_progress,
    track: Track = silent,
    stop: Callable[[], bool] = never,
    tensorboard: bool = False,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Train what a configured run still lacks, predict its held-out scans from their files, write and return scores.

    The report and its pictures follow: after every epoch, and at the end with the scores. Several ranks call it
    together within `process_group`; all get the scores.

    Raises InputError when the prepared data are not those the run was configured for, and what `train` raises.
    """
    forget_peak_memory(device)  # of an earlier fold
    config = run.config
    if prepared.plan != config.plan:
        raise InputError(
            f"{prepared.folder}: its classes, channels or spacing are not those that {run.path} was configured for; "
            "restore the dataset, or train into a new --out."
        )
    by_name = {case.name: case for case in prepared.cases}
    if missing := sorted({*config.train_cases, *config.held_out_cases} - by_name.keys()):
        raise InputError(
            f"{prepared.folder}: case {missing[0]} of the run {run.path} is gone; restore it, or train anew."
        )
    held_out = [case for case in dataset.cases if case.name in config.held_out_cases and case.label is not None]
    pairs = scored_files(held_out, run.validation_folder, config.evaluation.grid)
    # What predicting a case writes: its label map and, on another grid than the scan's, the reference on that.
    written = {name: [file for file in files if file.is_relative_to(run.validation_folder)] for name, *files in pairs}
    unfinished = not run.scores_file.exists()
    wait_for_all()  # before the first rank may finish it
    if unfinished:
        train_cases, validation_cases = (
            [by_name[name] for name in names] for names in (config.train_cases, config.held_out_cases)
        )
        dtype = training_dtype(config.training, device)
        after_epoch: Callable[[torch.nn.Module], None] = ignore_epoch
        if ranks.first:
            run.append_environment(describe_environment(device, ranks))
            after_epoch = follow_training(run, validation_cases, device, dtype, tensorboard=tensorboard)
        model = train(
            run, train_cases, validation_cases, device, watch=watch, stop=stop, after_epoch=after_epoch, ranks=ranks
        )
        if ranks.first:
            for files in written.values():
                for file in files:
                    file.unlink(missing_ok=True)
        wait_for_all()  # the first rank writes the weights
        if config.evaluation.weights == "best":
            model = run.load_model("best").to(device)
        predictor = Predictor(
            [model],
            config.plan,
            config.patch_size,
            device,
            autocast=dtype,
            weighting=config.evaluation.weighting,
        )
        started = time.perf_counter()
        share(
            lambda case: predict_held_out(predictor, [case], run.validation_folder, config.evaluation.grid),
            held_out,
            name=lambda case: case.name,
            finished=lambda case: all(file.exists() for file in written[case.name]),
            folder=run.validation_folder / ".locks",
            ranks=ranks,
            for_each=partial(in_order, track=track, description="Predicting"),
        )
        if ranks.first:
            run.record_resources(prediction_seconds=time.perf_counter() - started)
    started = time.perf_counter()
    evaluation = evaluate_files(
        pairs,
        config.plan.labels,
        track,
        missing_class=config.evaluation.missing_class,
        folder=run.validation_folder,
        ranks=ranks,
    )
    evaluation = replace(evaluation, protocol=config.protocol, leaks=config.leaks)
    if ranks.first:
        run.record_resources(scoring_seconds=time.perf_counter() - started, **peak_memory(device))
        write_tables(evaluation, run.validation_folder)
        complete_report(run, dataset, evaluation, pairs)
        write_text_atomically(run.scores_file, json.dumps(summarise(evaluation), indent=2))
    return evaluation


def describe_environment(device: torch.device, ranks: Ranks = ALONE) -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    packages = ("utnetv2-fast", "torch", "triton", "numpy", "scipy", "nibabel")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": ranks.count,
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
