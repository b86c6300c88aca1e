"""Carrying out the trials of a study, one after the other or spread over the ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from utnetv2_fast.data.dataset import Dataset
from utnetv2_fast.data.prepare import Prepared
from utnetv2_fast.errors import DivergedError, InputError
from utnetv2_fast.experiment import configure, run_fold
from utnetv2_fast.files import write_text_atomically
from utnetv2_fast.models import build_network
from utnetv2_fast.progress import Track, silent
from utnetv2_fast.ranks import Ranks
from utnetv2_fast.sharing import in_order, share
from utnetv2_fast.study.folder import PRETRAINED, Budget, Study, StudyFolder, Trial
from utnetv2_fast.training import RunConfig
from utnetv2_fast.training.loop import Progress, never, seconds_per_step
from utnetv2_fast.training.recipe import change_training, with_network
from utnetv2_fast.training.run_folder import only_training_in

Following = Callable[[Trial], AbstractContextManager[Callable[[Progress], None]]]


def check_trials(folder: StudyFolder, study: Study, prepared: Prepared, trials: Sequence[Trial]) -> None:
    """Configure and build each network of each fold, without memory for its weights, before any is trained.

    Raises InputError for a fold that is not there, a package that a network needs, weights that it does not take.
    """
    for trial in {(trial.network, trial.fold): trial for trial in trials}.values():
        config = configure_trial(folder, study, prepared, trial)
        with torch.device("meta"):
            build_network(config.model)


def run_study(
    folder: StudyFolder,
    study: Study,
    trials: Sequence[Trial],
    dataset: Dataset,
    prepared: Prepared,
    device: torch.device,
    *,
    follow: Following,
    track: Track = silent,
    stop: Callable[[], bool] = never,
    ranks: Ranks,
) -> list[Trial]:
    """Do what is not done yet: time steps, train, predict and score. Returns the trials that cannot come to an end.

    Of several ranks each takes the next trial that is free. `follow(trial)` is entered around each and gives what to
    call after every step. A trial that was stopped goes on where it was; one whose loss is no number any more is left,
    for it would be so again, and the others go on.

    Raises what `experiment.run_fold` raises otherwise, and InputError while another program is at one of these trials.
    """
    locks = folder.path / ".locks"
    networks = list(dict.fromkeys(trial.network for trial in trials)) if study.minutes is not None else []

    def measure(networks: Sequence[str]) -> None:
        for network in track([name for name in networks if folder.budget(name) is None], "Timing"):
            _measure(folder, study, prepared, network, trials[0].fold, device)

    # One piece of work for all: timed beside each other they would take from each other, and not all alike.
    share(
        measure,
        [networks],
        name=lambda _: "budgets",
        finished=lambda networks: all(folder.budget_file(network).exists() for network in networks),
        folder=locks,
        ranks=ranks,
        for_each=in_order,
    )

    def carry_out(trial: Trial) -> None:
        run = folder.run(trial)
        with only_training_in(run.path), follow(trial) as watch:
            if not run.begun:
                run.write_config(configure_trial(folder, study, prepared, trial))
            try:
                run_fold(run, dataset, prepared, device, watch=watch, track=track, stop=stop)
            except DivergedError as error:
                write_text_atomically(folder.failure_file(trial), f"{error}\n")

    share(
        carry_out,
        trials,
        name=lambda trial: "-".join(map(str, trial)),
        finished=lambda trial: folder.run(trial).scores_file.exists() or folder.failure_file(trial).exists(),
        folder=locks,
        ranks=ranks,
        for_each=in_order,
    )
    return [trial for trial in trials if folder.failure_file(trial).exists()]


def configure_trial(folder: StudyFolder, study: Study, prepared: Prepared, trial: Trial) -> RunConfig:
    """The study's recipe for the trial's network and seed, with the steps of its budget.

    Raises InputError when weights to begin with are asked for and not given, and what `experiment.configure` raises.
    """
    network, pretrained = trial.network.removesuffix(PRETRAINED), None
    if trial.network != network:
        if network not in study.pretrained:
            raise InputError(f"{trial.network}: which weights? Give them as --pretrained {network}=FILE.")
        pretrained = Path(study.pretrained[network])
    changes = {"seed": trial.seed}
    if (budget := folder.budget(trial.network)) is not None:
        changes["steps_per_epoch"] = budget.steps_per_epoch
    recipe = change_training(with_network(study.recipe, network), changes)
    return configure(prepared, Path(study.data), recipe, trial.fold, share=trial.share, pretrained=pretrained)


def _measure(
    folder: StudyFolder, study: Study, prepared: Prepared, network: str, fold: int, device: torch.device
) -> None:
    """Find out how many steps of `network` fill the study's minutes here.

    Raises InputError when other networks were timed on another kind of device, or with other threads.
    """
    assert study.minutes is not None
    for file in folder.path.glob("budget-*.json"):
        other = folder.budget(file.stem.removeprefix("budget-"))
        if other is not None and (other.device, other.threads) != (str(device), torch.get_num_threads()):
            raise InputError(
                f"{file}: was timed on {other.device} with {other.threads} threads; go on there, or begin a new study."
            )
    config = configure_trial(folder, study, prepared, Trial(network, 0, fold))
    cases = [case for case in prepared.cases if case.name in config.train_cases]
    seconds = seconds_per_step(config, cases, device)
    folder.write_budget(
        network,
        Budget(
            device=str(device),
            threads=torch.get_num_threads(),
            seconds_per_step=seconds,
            steps_per_epoch=max(1, round(60 * study.minutes / seconds / config.training.epochs)),
        ),
    )
