"""What the verbs that train many networks share: their options, and how they go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table as ScreenTable

from utnetv2_fast.cli.console import console, print_json, stop_signals, stopping
from utnetv2_fast.cli.console import track as show_progress
from utnetv2_fast.cli.train import demo_dataset, training_bar
from utnetv2_fast.errors import InputError, Stopped
from utnetv2_fast.memory import keep_freed_memory
from utnetv2_fast.ranks import ranks_of_this_job

if TYPE_CHECKING:
    from utnetv2_fast.study.folder import Trial
    from utnetv2_fast.study.report import Outcome
    from utnetv2_fast.study.results import Result
    from utnetv2_fast.study.tables import Table
    from utnetv2_fast.training.loop import Progress

Data = Annotated[
    Path | None,
    typer.Option(help="A dataset folder (nnU-Net raw or Decathlon).", show_default="a demo dataset, made in demo/"),
]
Out = Annotated[
    Path, typer.Option(help="The folder of the study; the same command goes on with what is not done in it.")
]
Models = Annotated[
    str, typer.Option("--models", help="Networks, separated by commas: see `utnetv2-fast info`.", show_default=True)
]
PresetName = Annotated[
    str | None, typer.Option("--preset", help="Sizes and settings of all of them.", show_default="tiny, by slices")
]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="All settings: the name of a recipe, or FILE.yaml.")]
ProtocolName = Annotated[str | None, typer.Option("--protocol", help="clean or paper.", show_default="the recipe's")]
Folds = Annotated[str, typer.Option(help="Numbers separated by commas, or all.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many trainings of each, with the seeds 0, 1, ...")]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="Train each network that long: a step of each is timed here first, and the steps follow from it.",
        show_default="as many steps as the recipe has",
    ),
]
HeldOut = Annotated[
    str | None,
    typer.Option(
        help="Hold these cases out instead of folds, by a column of cases.csv: subset=testing, or vendor=C,D.",
        show_default="folds",
    ),
]
PreparedFolder = Annotated[
    Path | None, typer.Option("--prepared", help="Where prepared cases are or go.", show_default="prepared/DATASET-..")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Epochs = Annotated[int | None, typer.Option(min=1, show_default="the recipe's")]
StepsPerEpoch = Annotated[int | None, typer.Option(min=1, show_default="the recipe's")]
BatchSize = Annotated[int | None, typer.Option(min=1, show_default="the recipe's")]


def carry_out(
    context: typer.Context,
    *,
    out: Path,
    data: Path | None,
    networks: Sequence[str],
    preset: str | None,
    recipe: str | None,
    protocol: str | None,
    folds: str,
    seeds: int,
    shares: Sequence[float],
    minutes: float | None,
    held_out: str | None,
    prepared: Path | None,
    device: str,
    changes: Mapping[str, Any],
) -> list[Result]:
    """Set up or go on with the study in `out`, train what is not trained, and return all that is finished there.

    Empty on all ranks of a job but the first.
    """
    from utnetv2_fast.data.dataset import read_dataset
    from utnetv2_fast.data.prepare import default_folder
    from utnetv2_fast.data.prepare import prepare as prepare_dataset
    from utnetv2_fast.data.splits import load_or_make_splits
    from utnetv2_fast.devices import resolve_device
    from utnetv2_fast.experiment import suggest_preset
    from utnetv2_fast.models import find_network, get_preset
    from utnetv2_fast.study.folder import Study, StudyFolder, trials
    from utnetv2_fast.study.results import read_results
    from utnetv2_fast.study.run import run_study
    from utnetv2_fast.training.recipe import change_training, load_recipe, recipe_for_preset

    keep_freed_memory()
    stop = context.with_resource(stop_signals())
    track = stopping(show_progress, stop)
    ranks = ranks_of_this_job()
    target = resolve_device(device, ranks.local)
    dataset = read_dataset(data) if data is not None else demo_dataset(track, ranks)
    which = _protocol(protocol)
    if recipe is None:
        settings = recipe_for_preset(preset or suggest_preset(dataset, target), which or "clean")
    else:
        settings = load_recipe(recipe, which)
        if preset is not None:
            settings = settings.model_copy(update={"preset": preset, "patch_size": None})
    if held_out is not None:
        rules = settings.split.model_copy(update={"held_out": _columns(held_out)})
        settings = settings.model_copy(update={"split": rules})
    settings = change_training(settings, {name: value for name, value in changes.items() if value is not None})
    dimensions, preparation = get_preset(settings.preset).dimensions, settings.preparation
    for network in networks:
        find_network(network, dimensions)
    folder = prepared or default_folder(dataset, dimensions, preparation)
    store = prepare_dataset(dataset, folder, dimensions, track, preparation, ranks=ranks)
    study = Study(
        data=str(dataset.folder.resolve()), prepared=str(folder.resolve()), recipe=settings, minutes=minutes or None
    )
    count = len(load_or_make_splits(store, settings.split))
    numbers = list(range(count)) if folds == "all" else _numbers(folds)
    place = StudyFolder(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder as --out.")
    place.begin(study)
    wanted = trials(networks, range(seeds), numbers, shares)

    @contextmanager
    def follow(trial: Trial) -> Iterator[Callable[[Progress], None]]:
        done = sum(place.run(other).scores_file.exists() for other in wanted)
        sys.stderr.write(f"{trial} ({done} of {len(wanted)} done)\n")
        with ExitStack() as stack:
            yield stack.enter_context(training_bar()) if ranks.first else (lambda progress: None)

    try:
        run_study(place, study, wanted, dataset, store, target, follow=follow, track=track, stop=stop, ranks=ranks)
    except Stopped as stopped:
        raise Stopped(stopped.where) from None
    return read_results(place.runs()) if ranks.first else []


def present(outcome: Outcome, results: Sequence[Result], out: Path, *, json: bool, data: Path | None = None) -> None:
    """Write everything into `out`, and show the tables."""
    from utnetv2_fast.study.report import write_outcome

    write_outcome(outcome, results, out, data)
    if json:
        tables = {
            table.title: [dict(zip(table.header, row, strict=True)) for row in table.rows] for table in outcome.tables
        }
        print_json({"tables": tables, "sentences": outcome.sentences, "trials": len(results)})
        return
    for table in outcome.tables:
        console.print(screen_table(table))
    for sentence in outcome.sentences:
        console.print(sentence, highlight=False)
    console.print(f"{out}: report.html, tables.md, trials.csv, figures and pictures.", highlight=False)


def screen_table(table: Table) -> ScreenTable:
    """The first column to the left, the others to the right."""
    shown = ScreenTable(title=table.title, title_justify="left")
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def names(text: str) -> list[str]:
    """The parts of a list separated by commas; InputError when there are none."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise InputError(f"{text!r}: names nothing; give a list such as utnetv2,resunet.")
    return found


def _numbers(text: str) -> list[int]:
    parts = names(text)
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--folds {text}: give numbers of folds, such as 0,1, or all.")
    return [int(part) for part in parts]


def _columns(text: str) -> dict[str, tuple[str, ...]]:
    column, equals, values = text.partition("=")
    if not (column and equals and values):
        raise InputError(f"--held-out {text}: give a column of cases.csv and its values, such as vendor=C,D.")
    return {column: tuple(names(values))}


def _protocol(name: str | None) -> Any:
    if name not in (None, "clean", "paper"):
        raise InputError(f"--protocol {name}: give clean or paper.")
    return name
