"""The pictures and the report of a run folder: rewritten after every epoch, completed once the run is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from utnetv2_fast.data.dataset import Dataset
from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.data.sampling import Batch, PatchSampler
from utnetv2_fast.evaluation.figures import png, write_png
from utnetv2_fast.evaluation.metrics import Evaluation
from utnetv2_fast.evaluation.pictures import View, draw_patches, view_slice
from utnetv2_fast.evaluation.plots import draw_curves, draw_scores
from utnetv2_fast.evaluation.report import CaseFiles, Report, Training, picture_cases, write_report
from utnetv2_fast.memory import peak_memory
from utnetv2_fast.training import RunConfig, RunFolder
from utnetv2_fast.training.tensorboard import tensorboard_log

_PATCHES = 3


def follow_training(
    run: RunFolder,
    validation_cases: Sequence[PreparedCase],
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    tensorboard: bool = False,
) -> Callable[[torch.nn.Module], None]:
    """A function to call with the network after every epoch, when its metrics are written.

    It rewrites `curves.png`, `report.html` and `pictures/validation.png`, of patches that stay the same throughout,
    and with `tensorboard` adds to the event files in `tensorboard/`; InputError when that package is missing.
    """
    config = run.config
    log = tensorboard_log(run.path / "tensorboard", _classes(config)) if tensorboard else None
    patches = [(case, _validation_patch(config, case)) for case in validation_cases[:_PATCHES]]

    def after_epoch(network: torch.nn.Module) -> None:
        epochs = sum(1 for _ in run.read_metrics())
        views = [_predicted_view(config, case, patch, network, device, dtype) for case, patch in patches]
        picture = png(draw_patches(views, _classes(config), f"Held-out patches after epoch {epochs}"))
        write_png(run.pictures_folder / "validation.png", picture)
        run.record_resources(**peak_memory(device))
        write_report(run.report_file, _report(run, _training(run, picture)))
        if log is not None:
            log(run.read_metrics())

    return after_epoch


def complete_report(
    run: RunFolder, dataset: Dataset, evaluation: Evaluation, pairs: Sequence[tuple[str, Path, Path]]
) -> None:
    """Write the pictures of the scored cases, and the report with its scores.

    `pairs` are those that were scored: (case, prediction file, reference file).
    """
    images = {case.name: case.images for case in dataset.cases}
    files = {name: CaseFiles(images[name], reference, prediction) for name, prediction, reference in pairs}
    cases = picture_cases(evaluation, files, dataset.channels)
    for case in cases:
        if case.picture is not None:
            write_png(run.pictures_folder / f"{case.rank}.png", case.picture)
    figure = png(draw_scores(evaluation))
    write_png(run.pictures_folder / "scores.png", figure)
    report = _report(run, _training(run, patches=None))
    write_report(run.report_file, replace(report, evaluation=evaluation, scores_figure=figure, cases=cases))


def _report(run: RunFolder, training: Training) -> Report:
    config = run.config
    return Report(
        title=run.path.resolve().name,
        subtitle=f"{config.plan.dataset}: {_network(config)}, fold {config.fold}, seed {config.training.seed}, "
        f"{len(config.train_cases)} scans trained on, {len(config.held_out_cases)} held out",
        protocol=config.protocol,
        leaks=config.leaks,
        training=training,
    )


def _training(run: RunFolder, patches: bytes | None) -> Training:
    """What the run folder holds by now; writes `curves.png`."""
    config = run.config
    records = list(run.read_metrics())
    curves = None
    if records:
        curves = png(draw_curves(records, _classes(config), config.training.epochs))
        write_png(run.curves_file, curves)
    return Training(
        records=records,
        epochs=config.training.epochs,
        settings=_settings(config),
        configuration=run.config_file.read_text(encoding="utf-8"),
        environments=run.read_environments(),
        resources=run.read_resources(),
        curves=curves,
        patches=patches,
    )


def _settings(config: RunConfig) -> dict[str, str]:
    """The part of the configuration that a reader looks for first."""
    plan, training = config.plan, config.training
    spacing = " × ".join(f"{mm:.3g}" for mm in plan.spacing if mm is not None)  # noqa: RUF001
    return {
        "Dataset": config.data,
        "Classes": ", ".join(_classes(config)),
        "Channels": ", ".join(plan.channels),
        "Network": _network(config),
        "Weights at the start": config.pretrained or "random",
        "Patch": " × ".join(map(str, config.patch_size)) + " voxels",  # noqa: RUF001
        "Spacing": f"{spacing} mm" + (", slices as they are" if plan.dimensions == 2 else ""),
        "Length": f"{training.epochs} epochs of {training.steps_per_epoch} steps",
        "Batch": f"{training.batch_size} patches",
        "Learning rate": f"{training.learning_rate:g}, {training.schedule}",
        "Augmentation": training.augmentation if isinstance(training.augmentation, str) else "its own, see below",
        "Precision": training.precision,
        "Seed": str(training.seed),
    }


def _network(config: RunConfig) -> str:
    return config.preset if config.network == "utnetv2" else f"{config.network}, in place of {config.preset}"


def _classes(config: RunConfig) -> list[str]:
    return [label for label, value in config.plan.labels.items() if value != 0]


def _validation_patch(config: RunConfig, case: PreparedCase) -> Batch:
    """One patch of `case` on foreground, the same in every epoch."""
    sampler = PatchSampler([case], config.patch_size, config.patch_size, 1, config.training.seed, foreground_fraction=1)
    return sampler.batch(0)


@torch.no_grad()
def _predicted_view(
    config: RunConfig,
    case: PreparedCase,
    patch: Batch,
    network: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype | None,
) -> View:
    """The patch of `case`, in 3D its slice with most foreground, with what `network` makes of it."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = network(patch.image.to(device))
    image, reference = patch.image[0, 0].numpy(), patch.label[0].numpy()
    prediction = logits[0].argmax(0).to("cpu", torch.uint8).numpy()
    if reference.ndim == 3:
        fullest = int(np.argmax(np.count_nonzero(reference, axis=(1, 2))))
        image, reference, prediction = image[fullest], reference[fullest], prediction[fullest]
    spacing, axes = config.plan.spacing[1:], case.axes or config.plan.axes
    return view_slice(image, reference, prediction, spacing, axes[1:])
