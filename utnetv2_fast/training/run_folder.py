"""What a training leaves on disk, and the way back in: everything prediction needs is in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utnetv2_fast.data.plan import Plan
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import atomic_write, write_text_atomically
from utnetv2_fast.models import UTNetV2, UTNetV2Config
from utnetv2_fast.training.config import TrainingConfig

T = TypeVar("T")

Weights = Literal["last", "best"]


class RunConfig(BaseModel):
    """`config.yaml` of a run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: Literal["clean"] = "clean"
    preset: str
    data: str  # the dataset's folder
    prepared: str  # its prepared folder
    fold: int
    train_cases: tuple[str, ...]
    held_out_cases: tuple[str, ...]
    plan: Plan
    patch_size: tuple[int, ...]
    model: UTNetV2Config
    training: TrainingConfig


class RunFolder:
    """Paths, configuration and weights under one folder; nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def resume_file(self) -> Path:
        return self.path / "checkpoints" / "resume.pt"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def resources_file(self) -> Path:
        return self.path / "resources.json"

    @property
    def curves_file(self) -> Path:
        return self.path / "curves.png"

    @property
    def pictures_folder(self) -> Path:
        return self.path / "pictures"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def validation_folder(self) -> Path:
        return self.path / "validation"

    @property
    def scores_file(self) -> Path:
        """Written last: a run that has it is finished."""
        return self.path / "scores.json"

    def weights_file(self, weights: Weights) -> Path:
        return self.path / "checkpoints" / f"{weights}.safetensors"

    @property
    def config(self) -> RunConfig:
        """Raises InputError when the folder holds no run or a damaged configuration."""
        try:
            return RunConfig.model_validate(yaml.safe_load(self.config_file.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.path}: not a run folder (no config.yaml); name one that `train` wrote.") from None
        except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "not valid YAML"
            raise InputError(f"{self.config_file}: damaged or of another version ({detail}); train anew.") from None

    def write_config(self, config: RunConfig) -> None:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
        write_text_atomically(self.config_file, text)

    def save_weights(self, weights: Weights, state_dict: dict[str, Tensor]) -> None:
        # safetensors stores each tensor's own bytes, in the one order that every reader knows.
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
        with atomic_write(self.weights_file(weights)) as temporary:
            save_file(plain, temporary)

    def load_model(self, weights: Weights = "last") -> UTNetV2:
        """The trained network on the CPU in eval mode.

        Raises InputError when the run has no such weights (yet), or damaged ones, or those of another network.
        """
        config, file = self.config, self.weights_file(weights)
        try:
            state = load_file(file)
        except FileNotFoundError:
            raise InputError(f"{file}: no such weights; let the training of this run finish an epoch.") from None
        except SafetensorError:
            raise InputError(f"{file}: damaged weights; restore the file or train anew.") from None
        model = UTNetV2(config.model)
        try:
            model.load_state_dict(state)
        except RuntimeError:
            raise InputError(f"{file}: weights of another network than {self.config_file} describes.") from None
        return model.eval()

    def append_environment(self, description: dict[str, Any]) -> None:
        """Add to `environment.json`, which has one entry for every time the run was started or resumed."""
        write_text_atomically(self.environment_file, json.dumps([*self.read_environments(), description], indent=2))

    def read_environments(self) -> list[dict[str, Any]]:
        """The entries of `environment.json`, none before the first start."""
        return _read_json(self.environment_file, [])

    def record_resources(self, **measured: float | None) -> None:
        """Note seconds and peaks of memory in `resources.json`; of a peak noted before, the larger remains.

        What is None was not measured and leaves no trace.
        """
        noted = self.read_resources()
        for name, value in measured.items():
            if value is not None:
                noted[name] = max(value, noted.get(name, value)) if name.startswith("peak_") else value
        write_text_atomically(self.resources_file, json.dumps(noted, indent=2))

    def read_resources(self) -> dict[str, float]:
        """The content of `resources.json`, nothing before the first epoch has finished."""
        return _read_json(self.resources_file, {})

    def append_metrics(self, record: dict[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The records of `metrics.jsonl`, one per epoch; a last line that a kill cut short is left out."""
        if not self.metrics_file.exists():
            return
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def keep_metrics_before(self, epoch: int) -> None:
        """Drop the records from `epoch` on, which a resumed training writes again."""
        kept = [json.dumps(record) for record in self.read_metrics() if record["epoch"] < epoch]
        write_text_atomically(self.metrics_file, "".join(line + "\n" for line in kept))


def _read_json(file: Path, default: T) -> T:
    """The content of a file that this program wrote, or `default` where there is none yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else default
