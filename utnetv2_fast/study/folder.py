"""A study on disk: what all of its trainings have in common, and where each of them lies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from utnetv2_fast import plain_yaml
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import read_bounded, write_text_atomically
from utnetv2_fast.training import Recipe, RunFolder

_LARGEST_FILE = 2**20  # bytes
PRETRAINED = "-pretrained"
"""What the name of a network ends in that begins with published weights: the paper's rows with a dagger."""


class Trial(NamedTuple):
    """One training of a study: a network, a seed, a fold, and the share of the fold's patients that it is shown."""

    network: str
    seed: int
    fold: int
    share: float = 1.0

    def __str__(self) -> str:
        part = "" if self.share == 1 else f", {100 * self.share:g}% of the patients"
        return f"{self.network}, seed {self.seed}, fold {self.fold}{part}"


class Study(BaseModel):
    """`study.yaml`: what all trials have in common. Unknown fields are refused.

    `minutes` is for how long each network takes training steps; None leaves their number to the recipe. `pretrained`
    holds {network: file} of weights to begin with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    prepared: str
    recipe: Recipe
    minutes: PositiveFloat | None = None
    pretrained: Mapping[str, str] = {}


class Budget(BaseModel):
    """`budget-NETWORK.json`: what a training step took, where, and the steps per epoch that came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    threads: PositiveInt
    seconds_per_step: PositiveFloat
    steps_per_epoch: PositiveInt


class StudyFolder:
    """Paths under one folder: `study.yaml`, budgets, and `NETWORK/[patients-10/]seed-0/fold-0`, a run folder each."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def study_file(self) -> Path:
        return self.path / "study.yaml"

    def budget_file(self, network: str) -> Path:
        return self.path / f"budget-{network}.json"

    def run(self, trial: Trial) -> RunFolder:
        part = () if trial.share == 1 else (f"patients-{100 * trial.share:g}",)
        return RunFolder(self.path.joinpath(trial.network, *part, f"seed-{trial.seed}", f"fold-{trial.fold}"))

    def failure_file(self, trial: Trial) -> Path:
        """Holds why the trial cannot come to an end; deleted, it is tried again."""
        return self.run(trial).path / "failed.txt"

    def runs(self) -> list[RunFolder]:
        """Of all trials that were set up, in the order of their paths."""
        patterns = ("*/seed-*/fold-*/config.yaml", "*/patients-*/seed-*/fold-*/config.yaml")
        return [RunFolder(file.parent) for pattern in patterns for file in sorted(self.path.glob(pattern))]

    def read(self) -> Study:
        """Raises InputError when the folder holds no study, or a damaged one."""
        try:
            content = plain_yaml.load(read_bounded(self.study_file, _LARGEST_FILE).decode("utf-8"))
            return Study.model_validate(content)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.path}: not the folder of a study (no study.yaml).") from None
        except (yaml.YAMLError, UnicodeDecodeError, ValidationError):
            raise InputError(f"{self.study_file}: damaged or of another version; begin a new study.") from None

    def begin(self, study: Study) -> None:
        """Write what the trials have in common; once one of them has begun it must be the same.

        So a study that was stopped goes on by the same command, and networks, seeds, folds and shares can be added.
        Raises InputError naming what differs.
        """
        if self.study_file.exists() and any(run.begun for run in self.runs()):
            there = self.read()
            # Weights to begin with come with the networks that are added.
            differing = [
                name
                for name in Study.model_fields
                if name != "pretrained" and getattr(there, name) != getattr(study, name)
            ]
            if differing:
                raise InputError(
                    f"{self.study_file}: was begun with other settings ({', '.join(differing)}); give those, or "
                    "another --out."
                )
            study = study.model_copy(update={"pretrained": {**there.pretrained, **study.pretrained}})
        text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, width=120)
        write_text_atomically(self.study_file, text)

    def budget(self, network: str) -> Budget | None:
        """None before it is measured; InputError when its file is damaged."""
        file = self.budget_file(network)
        if not file.exists():
            return None
        try:
            return Budget.model_validate_json(read_bounded(file, _LARGEST_FILE))
        except ValidationError:
            raise InputError(f"{file}: damaged; delete it to have it measured anew.") from None

    def write_budget(self, network: str, budget: Budget) -> None:
        write_text_atomically(self.budget_file(network), json.dumps(budget.model_dump(), indent=2))


def trials(
    networks: Sequence[str], seeds: Sequence[int], folds: Sequence[int], shares: Sequence[float] = (1.0,)
) -> list[Trial]:
    """All combinations, each network once before any twice: a study that is stopped has something of all of them."""
    combinations = [
        Trial(network, seed, fold, share)
        for seed in seeds
        for fold in folds
        for share in shares
        for network in networks
    ]
    return list(dict.fromkeys(combinations))
