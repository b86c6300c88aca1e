"""`utnetv2-fast train`: from a dataset folder to a trained, evaluated run."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar

from utnetv2_fast.cli.console import (
    SECONDS_BETWEEN_LINES,
    Json,
    console,
    messages,
    print_json,
    stop_signals,
    stopping,
)
from utnetv2_fast.cli.console import track as show_progress
from utnetv2_fast.cli.evaluate import score_table
from utnetv2_fast.errors import InputError, Stopped
from utnetv2_fast.memory import keep_freed_memory
from utnetv2_fast.ranks import Ranks, ranks_of_this_job

if TYPE_CHECKING:
    import torch

    from utnetv2_fast.data.dataset import Dataset
    from utnetv2_fast.progress import Track
    from utnetv2_fast.training import RunFolder
    from utnetv2_fast.training.loop import Progress
    from utnetv2_fast.training.recipe import Leak

DEMO = Path("demo")


def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(help="A dataset folder (nnU-Net raw or Decathlon).", show_default="a demo dataset, made in demo/"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Network: see `utnetv2-fast info`.", show_default="by slice thickness and device")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Another network in place of UTNetV2, of its published size, or as small as a tiny preset: "
            "see `utnetv2-fast info`.",
            show_default="the recipe's, or utnetv2",
        ),
    ] = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            help="Weights to begin with, as published: R50+ViT-B_16.npz for r50-unet and transunet, "
            "swin_tiny_patch4_window7_224.pth for swinunet and vt-unet.",
            show_default="random ones",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="All settings: the name of a recipe, or FILE.yaml; options below override it."),
    ] = None,
    protocol: Annotated[
        Literal["clean", "paper"] | None,
        typer.Option(help="clean, or paper: as the authors' code does it.", show_default="the recipe's, or clean"),
    ] = None,
    leak_best_epoch: Annotated[
        bool, typer.Option("--leak-best-epoch", help="Score the epoch that is best on the held-out scans.")
    ] = False,
    leak_label_crop: Annotated[
        bool, typer.Option("--leak-label-crop", help="Crop all scans, held-out ones too, to their labels.")
    ] = False,
    leak_resampled_grid: Annotated[
        bool, typer.Option("--leak-resampled-grid", help="Score on the network's grid, not on the scans' own.")
    ] = False,
    fold: Annotated[str | None, typer.Option(help="Number of the fold to hold out, or all.", show_default="0")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder to write.", show_default="runs/DATASET-PRESET-foldK")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out as it was set up.")] = False,
    prepared: Annotated[
        Path | None,
        typer.Option(help="Where prepared cases are or go.", show_default="prepared/DATASET-2d or -3d"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    epochs: Annotated[int | None, typer.Option(min=1, show_default="the preset's")] = None,
    steps_per_epoch: Annotated[int | None, typer.Option(min=1, show_default="the preset's")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, show_default="the preset's")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", min=0, show_default="the preset's")] = None,
    augmentation: Annotated[
        str | None, typer.Option(help="none, paper, nnunet or nnunet-no-mirroring.", show_default="nnunet")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, float32 or bfloat16.", show_default="bfloat16 where it is fast")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run training steps through torch.compile, which takes minutes to begin.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the metrics for TensorBoard too, to OUT/tensorboard.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, show_default="0")] = None,
    checkpoint_minutes: Annotated[
        float | None, typer.Option(min=0, help="Between states to resume from, within an epoch.", show_default="10")
    ] = None,
    json: Json = False,
) -> None:
    """Train UTNetV2 on a dataset, then predict and score the held-out fold. Prepares what is not prepared.

    Without --data it makes a small cardiac dataset and trains on that. SIGTERM or Ctrl-C stops it with everything
    saved; killed in any other way, it goes on from the last state that it saved. Started by torchrun, the processes
    train one network together and divide each batch among them.

    Examples:

    utnetv2-fast train

    utnetv2-fast train --data data/hippocampus --preset tiny-3d

    utnetv2-fast train --data data/acdc --preset acdc-2d --fold all --out runs/acdc

    utnetv2-fast train --data data/acdc --preset acdc-2d --model resunet

    utnetv2-fast train --data data/acdc --preset acdc-2d --model swinunet --pretrained swin_tiny_patch4_window7_224.pth

    utnetv2-fast train --data data/bcv --recipe bcv-3d --protocol paper --leak-label-crop

    utnetv2-fast train --resume --out runs/acdc

    torchrun --nproc-per-node 2 -m utnetv2_fast train --data data/acdc --out runs/acdc
    """
    from utnetv2_fast.data.dataset import read_dataset
    from utnetv2_fast.data.prepare import default_folder
    from utnetv2_fast.data.prepare import prepare as prepare_dataset
    from utnetv2_fast.devices import resolve_device
    from utnetv2_fast.evaluation.folds import spread_over_folds
    from utnetv2_fast.evaluation.tables import summarise
    from utnetv2_fast.experiment import (
        existing_runs,
        new_runs,
        refuse_existing_runs,
        run_fold,
        suggest_preset,
    )
    from utnetv2_fast.models import get_preset
    from utnetv2_fast.training.loop import ignore_progress
    from utnetv2_fast.training.parallel import part_of_batch, process_group, wait_for_all
    from utnetv2_fast.training.recipe import change_training, load_recipe, recipe_for_preset, with_leaks, with_network
    from utnetv2_fast.training.run_folder import only_training_in
    from utnetv2_fast.training.tensorboard import require_tensorboard

    keep_freed_memory()
    if tensorboard:
        require_tensorboard()
    stop = context.with_resource(stop_signals())
    track = stopping(show_progress, stop)
    ranks = ranks_of_this_job()
    target = resolve_device(device, ranks.local)
    changes = _given(
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        learning_rate=learning_rate,
        augmentation=augmentation,
        precision=precision,
        compile=compile or None,
        seed=seed,
        checkpoint_minutes=checkpoint_minutes,
    )
    switches: dict[Leak, bool] = {
        "best-epoch": leak_best_epoch,
        "label-crop": leak_label_crop,
        "resampled-grid": leak_resampled_grid,
    }
    leaks = [leak for leak, on in switches.items() if on]
    if resume:
        if (
            out is None
            or changes
            or any(given is not None for given in (preset, model, pretrained, recipe, protocol, fold))
            or leaks
        ):
            raise InputError("--resume needs --out, and keeps the run's own settings: leave the others out.")
        runs, configs = existing_runs(out), []
        config = runs[0].config
        part_of_batch(config.training.batch_size, ranks)
        dataset = read_dataset(data or Path(config.data))
        folder, dimensions = prepared or Path(config.prepared), config.plan.dimensions
        store = prepare_dataset(dataset, folder, dimensions, track, config.preparation, ranks=ranks)
    else:
        folds = None if fold == "all" else [_fold_number(fold or "0")]
        dataset = read_dataset(data) if data is not None else demo_dataset(track, ranks)
        if recipe is None:
            settings = recipe_for_preset(preset or suggest_preset(dataset, target), protocol or "clean")
        else:
            settings = load_recipe(recipe, protocol)
            if preset is not None:
                settings = settings.model_copy(update={"preset": preset, "patch_size": None})
        settings = with_network(with_leaks(change_training(settings, changes), leaks), model or settings.network)
        dimensions, preparation = get_preset(settings.preset).dimensions, settings.preparation
        network = "" if settings.network == "utnetv2" else f"-{settings.network}"
        which = "all" if folds is None else f"fold{folds[0]}"
        name = f"{dataset.folder.resolve().name}-{settings.preset}{network}-{which}"
        out = out or Path("runs") / name
        part_of_batch(settings.training.batch_size, ranks)
        refuse_existing_runs(out)
        folder = prepared or default_folder(dataset, dimensions, preparation)
        store = prepare_dataset(dataset, folder, dimensions, track, preparation, ranks=ranks)
        configs = new_runs(store, dataset.folder, settings, folds, out, pretrained=pretrained)
        runs = [run for run, _ in configs]

    evaluations = []
    with process_group(ranks, target), ExitStack() as stack:
        if ranks.first:
            for path in dict.fromkeys((out, *(run.path for run in runs))):
                stack.enter_context(only_training_in(path))
            if not resume:
                refuse_existing_runs(out)  # which another training may have begun meanwhile
            for run, config in configs:
                run.write_config(config)
        wait_for_all()
        for run in runs:
            if ranks.first:
                _announce(run, len(store.cases), target, ranks)
            with _saying_how_to_resume(out, device), training_bar() if ranks.first else nullcontext() as watch:
                evaluation = run_fold(
                    run,
                    dataset,
                    store,
                    target,
                    watch=watch or ignore_progress,
                    track=track,
                    stop=stop,
                    tensorboard=tensorboard,
                    ranks=ranks,
                )
            evaluations.append(evaluation)
            if ranks.first and not json:
                if evaluation.leaks:
                    console.print(f"With leaks: {', '.join(evaluation.leaks)}.", highlight=False)
                console.print(score_table(evaluation))
    if not ranks.first:
        return
    spread = spread_over_folds(evaluations)
    if json:
        scores = {str(run.path): summarise(evaluation) for run, evaluation in zip(runs, evaluations, strict=True)}
        print_json({"runs": scores, "folds": spread})
        return
    if len(runs) > 1:
        dice, hd95 = spread["dice"], spread["hd95"]
        console.print(
            f"Over {len(runs)} folds: Dice {dice['mean']:.3f} ± {dice['std']:.3f}, "
            f"HD95 {hd95['mean']:.2f} ± {hd95['std']:.2f} mm.",
            highlight=False,
        )
    report = "report.html" if len(runs) == 1 else "a report.html of each fold"
    console.print(f"{out}: weights, metrics, predictions of the held-out scans, and {report}.", highlight=False)


def _announce(run: RunFolder, cases: int, device: torch.device, ranks: Ranks) -> None:
    together = "" if ranks.count == 1 else f", {ranks.count} processes"
    messages.print(f"{run.path}: {run.config.preset}, {cases} cases, fold {run.config.fold}, {device}{together}.")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _fold_number(fold: str) -> int:
    if not fold.isdecimal():
        raise InputError(f"--fold {fold}: give the number of a fold, such as 0, or all.")
    return int(fold)


def demo_dataset(track: Track, ranks: Ranks) -> Dataset:
    from utnetv2_fast.data.dataset import read_dataset
    from utnetv2_fast.data.phantom import write_phantom
    from utnetv2_fast.sharing import in_order, share

    share(
        lambda folder: write_phantom(folder, track=track),
        [DEMO],
        name=str,
        finished=lambda folder: (folder / "dataset.json").exists(),
        folder=DEMO / ".locks",
        ranks=ranks,
        for_each=in_order,
    )
    return read_dataset(DEMO)


@contextmanager
def _saying_how_to_resume(out: Path, device: str) -> Iterator[None]:
    try:
        yield
    except Stopped as stopped:
        options = "" if device == "auto" else f" --device {device}"
        raise Stopped(stopped.where, f"`utnetv2-fast train --resume --out {shlex.quote(str(out))}{options}`") from None


@contextmanager
def training_bar() -> Iterator[Callable[[Progress], None]]:
    """A function to call after every step: a bar in a terminal, else a line on stderr every ten seconds."""
    if not messages.is_terminal:
        yield _print_lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with ProgressBar(*columns, console=messages) as bar:
        task = bar.add_task("Training", total=None, figures="")

        def watch(progress: Progress) -> None:
            description = f"Training, epoch {progress.epoch}/{progress.epochs}"
            bar.update(
                task,
                description=description,
                completed=progress.step,
                total=progress.steps,
                figures=_figures(progress),
            )

        yield watch


def _print_lines() -> Callable[[Progress], None]:
    shown = time.monotonic()

    def watch(progress: Progress) -> None:
        nonlocal shown
        if time.monotonic() - shown >= SECONDS_BETWEEN_LINES or progress.step == progress.steps:
            shown = time.monotonic()
            sys.stderr.write(
                f"Training: epoch {progress.epoch}/{progress.epochs}, step {progress.step}/{progress.steps}, "
                f"{_figures(progress)}\n"
            )

    return watch


def _figures(progress: Progress) -> str:
    dice = "-" if progress.dice is None else f"{progress.dice:.3f}"
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    return f"loss {progress.loss:.3f}, Dice {dice}, {minutes}:{seconds:02d} left"
