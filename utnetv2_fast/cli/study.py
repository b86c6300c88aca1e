"""What the verbs that train many networks share: their options, and how they go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table as ScreenTable

from utnetv2_fast.cli.console import console, print_json, stop_signals, stopping
from utnetv2_fast.cli.console import track as show_progress
from utnetv2_fast.cli.train import demo_dataset, training_bar
from utnetv2_fast.errors import InputError, RunError
from utnetv2_fast.memory import keep_freed_memory
from utnetv2_fast.ranks import ranks_of_this_job

if TYPE_CHECKING:
    from utnetv2_fast.data.dataset import Dataset
    from utnetv2_fast.study.folder import Trial
    from utnetv2_fast.study.report import Outcome
    from utnetv2_fast.study.results import Result
    from utnetv2_fast.study.tables import Table
    from utnetv2_fast.training import Recipe
    from utnetv2_fast.training.loop import Progress

Data = Annotated[
    Path | None,
    typer.Option(help="A dataset folder (nnU-Net raw or Decathlon).", show_default="a demo dataset, made in demo/"),
]
Out = Annotated[
    Path, typer.Option(help="The folder of the study; the same command goes on with what is not done in it.")
]
Models = Annotated[
    str,
    typer.Option(
        "--models", help="Networks, separated by commas: see `utnetv2-fast info`. NAME-pretrained: with --pretrained."
    ),
]
Pretrained = Annotated[
    list[str] | None,
    typer.Option(help="Published weights that NAME-pretrained begins with, as NAME=FILE.", show_default=False),
]
PresetName = Annotated[
    str | None,
    typer.Option("--preset", help="Sizes and settings of all of them.", show_default="by slice thickness and device"),
]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="All settings: the name of a recipe, or FILE.yaml.")]
ProtocolName = Annotated[
    Literal["clean", "paper"] | None,
    typer.Option("--protocol", help="clean, or paper: as the authors' code does it.", show_default="the recipe's"),
]
Folds = Annotated[str, typer.Option(help="Numbers separated by commas, or all.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many trainings of each, with the seeds 0, 1, ...")]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="As many steps of each network as fill that time: they are timed here first, one network after the other.",
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


def carry_out(context: typer.Context, networks: Sequence[str], shares: Sequence[float] = (1.0,)) -> None:
    """Do what the options of the verb ask for: set up or go on with the study, then show all that is finished in it.

    Raises RunError when some of the trainings cannot come to an end, after the others are shown.
    """
    from utnetv2_fast.data.dataset import read_dataset
    from utnetv2_fast.data.prepare import default_folder
    from utnetv2_fast.data.prepare import prepare as prepare_dataset
    from utnetv2_fast.data.splits import load_or_make_splits
    from utnetv2_fast.devices import resolve_device
    from utnetv2_fast.models import get_preset
    from utnetv2_fast.study.folder import Study, StudyFolder, trials
    from utnetv2_fast.study.report import compared
    from utnetv2_fast.study.results import read_results
    from utnetv2_fast.study.run import check_trials, run_study

    options = context.params
    if options["minutes"] is not None and options["steps_per_epoch"] is not None:
        raise InputError("--minutes decides the steps of each network: leave --steps-per-epoch out.")
    keep_freed_memory()
    stop = context.with_resource(stop_signals())
    track = stopping(show_progress, stop)
    ranks = ranks_of_this_job()
    device = resolve_device(options["device"], ranks.local)
    data, out = options["data"], options["out"]
    dataset = read_dataset(data) if data is not None else demo_dataset(track, ranks)
    recipe = _recipe(dataset, device, options)
    dimensions, preparation = get_preset(recipe.preset).dimensions, recipe.preparation
    folder = options["prepared"] or default_folder(dataset, dimensions, preparation)
    prepared = prepare_dataset(dataset, folder, dimensions, track, preparation, ranks=ranks)
    folds = range(len(load_or_make_splits(prepared, recipe.split)))
    wanted = trials(
        networks, range(options["seeds"]), folds if options["folds"] == "all" else _numbers(options["folds"]), shares
    )
    study = Study(
        data=str(dataset.folder.resolve()),
        prepared=str(folder.resolve()),
        recipe=recipe,
        minutes=options["minutes"],
        pretrained=_files(options.get("pretrained") or ()),
    )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder as --out.")
    place = StudyFolder(out)
    check_trials(place, study, prepared, wanted)
    place.begin(study)

    @contextmanager
    def follow(trial: Trial) -> Iterator[Callable[[Progress], None]]:
        done = sum(place.run(other).scores_file.exists() for other in wanted)
        sys.stderr.write(f"{trial} ({done} of {len(wanted)} done)\n")
        with training_bar() if ranks.first else nullcontext(_ignore) as watch:
            yield watch

    failed = run_study(
        place, study, wanted, dataset, prepared, device, follow=follow, track=track, stop=stop, ranks=ranks
    )
    if not ranks.first:
        return
    failures = [f"Failed: {trial}: {place.failure_file(trial).read_text(encoding='utf-8').strip()}" for trial in failed]
    if results := read_results(place.runs()):
        outcome = compared(results)
        outcome.sentences.extend(failures)
        present(outcome, results, out, json=options["json"])
    if failures:
        raise RunError(
            f"{len(failed)} of {len(wanted)} failed. {failures[0]} The others are in {out}; to try one anew, "
            f"delete its {place.failure_file(failed[0]).name}."
        )


def present(outcome: Outcome, results: Sequence[Result], out: Path, *, json: bool) -> None:
    """Write everything into `out`, and show the tables."""
    from utnetv2_fast.study.report import write_outcome

    write_outcome(outcome, results, out)
    if json:
        print_json({"results": outcome.numbers, "sentences": outcome.sentences, "folder": str(out)})
        return
    for table in outcome.tables:
        console.print(_on_screen(table))
    for sentence in outcome.sentences:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"{out}: report.html, tables.md, trials.csv, figures and pictures.", highlight=False, markup=False)


def names(text: str) -> list[str]:
    """The parts of a list separated by commas; InputError when there are none."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise InputError(f"{text!r}: names nothing; give a list such as utnetv2,resunet.")
    return found


def _on_screen(table: Table) -> ScreenTable:
    """The first column to the left, the others to the right."""
    shown = ScreenTable(title=escape(table.title), title_justify="left", box=SIMPLE, padding=(0, 1))
    for number, name in enumerate(table.header):
        shown.add_column(escape(name), justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def _recipe(dataset: Dataset, device: Any, options: Mapping[str, Any]) -> Recipe:
    """The settings that all networks are trained by."""
    from utnetv2_fast.experiment import suggest_preset
    from utnetv2_fast.training.recipe import change_training, load_recipe, recipe_for_preset

    preset, protocol = options["preset"], options["protocol"]
    if options["recipe"] is None:
        recipe = recipe_for_preset(preset or suggest_preset(dataset, device), protocol or "clean")
    else:
        recipe = load_recipe(options["recipe"], protocol)
        if preset is not None:
            recipe = recipe.model_copy(update={"preset": preset, "patch_size": None})
    if options["held_out"] is not None:
        rules = recipe.split.model_copy(update={"held_out": _columns(options["held_out"])})
        recipe = recipe.model_copy(update={"split": rules})
    changes = {name: options[name] for name in ("epochs", "steps_per_epoch", "batch_size") if options[name] is not None}
    return change_training(recipe, changes)


def _ignore(progress: Progress) -> None:
    """What is called after every step where nobody watches."""


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


def _files(given: Sequence[str]) -> dict[str, str]:
    files = {}
    for text in given:
        network, equals, file = text.partition("=")
        if not (network and equals and file):
            raise InputError(f"--pretrained {text}: give a network and a file, such as swinunet=swin_tiny.pth.")
        files[network] = str(Path(file).resolve())
    return files
