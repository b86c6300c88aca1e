"""Carrying out the trials of a study, one after the other or spread over the ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from utnetv2_fast.data.dataset import Dataset
from utnetv2_fast.data.prepare import Prepared
from utnetv2_fast.experiment import configure, run_fold
from utnetv2_fast.progress import Track, silent
from utnetv2_fast.ranks import Ranks
from utnetv2_fast.sharing import in_order, share
from utnetv2_fast.study.folder import Budget, Study, StudyFolder, Trial
from utnetv2_fast.training import RunConfig
from utnetv2_fast.training.loop import Progress, never, seconds_per_step
from utnetv2_fast.training.recipe import change_training, with_network
from utnetv2_fast.training.run_folder import only_training_in

Following = Callable[[Trial], AbstractContextManager[Callable[[Progress], None]]]


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
) -> None:
    """Do what is not done yet: measure budgets, train, predict and score; return when no trial is left.

    Of several ranks each takes the next trial that is free. `follow(trial)` is entered around each and gives what to
    call after every step. A trial that was stopped goes on where it was.

    Raises what `experiment.run_fold` raises, and InputError while another program is at one of these trials.
    """
    locks = folder.path / ".locks"
    networks = list(dict.fromkeys(trial.network for trial in trials)) if study.minutes is not None else []
    share(
        partial(_measure, folder, study, prepared, trials[0].fold, device),
        networks,
        name=lambda network: f"budget-{network}",
        finished=lambda network: folder.budget_file(network).exists(),
        folder=locks,
        ranks=ranks,
        for_each=partial(in_order, track=track, description="Timing"),
    )

    def carry_out(trial: Trial) -> None:
        run = folder.run(trial)
        with only_training_in(run.path), follow(trial) as watch:
            if not run.begun:
                run.write_config(configure_trial(folder, study, prepared, trial))
            run_fold(run, dataset, prepared, device, watch=watch, track=track, stop=stop)

    share(
        carry_out,
        trials,
        name=lambda trial: "-".join(map(str, trial)),
        finished=lambda trial: folder.run(trial).scores_file.exists(),
        folder=locks,
        ranks=ranks,
        for_each=in_order,
    )


def configure_trial(folder: StudyFolder, study: Study, prepared: Prepared, trial: Trial) -> RunConfig:
    """The study's recipe for the trial's network and seed, with the steps of its budget."""
    changes = {"seed": trial.seed}
    if (budget := folder.budget(trial.network)) is not None:
        changes["steps_per_epoch"] = budget.steps_per_epoch
    recipe = change_training(with_network(study.recipe, trial.network), changes)
    return configure(prepared, Path(study.data), recipe, trial.fold, share=trial.share)


def _measure(
    folder: StudyFolder, study: Study, prepared: Prepared, fold: int, device: torch.device, network: str
) -> None:
    """Find out how many steps of `network` fill the study's minutes here."""
    assert study.minutes is not None
    config = configure(prepared, Path(study.data), with_network(study.recipe, network), fold)
    cases = [case for case in prepared.cases if case.name in config.train_cases]
    seconds = seconds_per_step(config, cases, device)
    steps = max(1, round(60 * study.minutes / seconds / config.training.epochs))
    folder.write_budget(network, Budget(seconds_per_step=seconds, steps_per_epoch=steps))
