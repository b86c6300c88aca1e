"""A study on disk: what all of its trainings have in common, and where each of them lies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from utnetv2_fast import plain_yaml
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import read_bounded, write_text_atomically
from utnetv2_fast.training import Recipe, RunFolder

_LARGEST_FILE = 2**20  # bytes


class Trial(NamedTuple):
    """One training of a study: a network, a seed, a fold, and the share of the fold's patients that it is shown."""

    network: str
    seed: int
    fold: int
    share: float = 1.0

    def __str__(self) -> str:
        part = "" if self.share == 1 else f", {self.share:.0%} of the patients"
        return f"{self.network}, seed {self.seed}, fold {self.fold}{part}"


class Study(BaseModel):
    """`study.yaml`: what all trials have in common. Unknown fields are refused.

    `minutes` is how long each network is trained on this machine; None leaves the steps to the recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    prepared: str
    recipe: Recipe
    minutes: PositiveFloat | None = None


class Budget(BaseModel):
    """`budget-NETWORK.json`: what a training step took here, and the steps per epoch that came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        """Write what the trials have in common; where that is there already, it must be the same.

        So a study that was stopped goes on by the same command, and networks, seeds, folds and shares can be added.
        Raises InputError naming what differs.
        """
        if not self.study_file.exists():
            text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, width=120)
            write_text_atomically(self.study_file, text)
            return
        there = self.read()
        if there != study:
            differing = [name for name in Study.model_fields if getattr(there, name) != getattr(study, name)]
            raise InputError(
                f"{self.study_file}: was begun with other settings ({', '.join(differing)}); give those, or another "
                "--out."
            )

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
