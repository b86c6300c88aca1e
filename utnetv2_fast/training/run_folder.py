"""What a training leaves on disk, and the way back in: everything prediction needs is in the run folder."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utnetv2_fast import plain_yaml
from utnetv2_fast.data.plan import Plan, Preparation
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import atomic_write, lies_inside, read_bounded, write_text_atomically
from utnetv2_fast.locks import NoLocksError, holder, try_lock
from utnetv2_fast.models import AnyNetworkConfig, SegmentationNetwork, build_network
from utnetv2_fast.tensor_files import DAMAGE, read_torch_archive
from utnetv2_fast.training.config import EvaluationConfig, TrainingConfig

T = TypeVar("T")

Weights = Literal["last", "best"]

_LARGEST_CONFIG = 2**22  # bytes: what names a hundred thousand cases, and takes PyYAML a minute
_LARGEST_RECORDS = 2**26
_LARGEST_PATCH = 2**24  # voxels
_CHECKSUM = "blake2b"  # in the metadata of a safetensors file, which has no checksum of its own


class RunConfig(BaseModel):
    """`config.yaml` of a run folder: plain settings; `protocol` only names where they came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: Literal["clean", "paper"] = "clean"
    preset: str
    network: str = "utnetv2"
    data: str  # the dataset's folder
    prepared: str  # its prepared folder
    fold: int
    share_of_patients: float = Field(default=1.0, gt=0, le=1, description="of the fold's, that are trained on")
    train_cases: tuple[str, ...]
    held_out_cases: tuple[str, ...]
    preparation: Preparation = Preparation()
    plan: Plan
    patch_size: tuple[int, ...]
    model: AnyNetworkConfig
    pretrained: str | None = None  # file of the weights that the training began with
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def leaks(self) -> tuple[str, ...]:
        """What the scores of this run know of the held-out scans' label maps, in words."""
        known = {
            "the epoch was chosen on the held-out scans": self.evaluation.weights == "best",
            "the held-out scans were cropped to their reference labels": self.plan.crop == "label",
            "the scores were taken on the network's grid, with resampled references": self.evaluation.grid
            == "resampled",
        }
        return tuple(leak for leak, present in known.items() if present)

    @model_validator(mode="after")
    def _sizes_agree(self) -> RunConfig:
        if not len(self.patch_size) == self.plan.dimensions == self.model.dimensions:
            raise ValueError("patch_size, plan and model must have the same dimensions")
        if min(self.patch_size) < 1 or prod(self.patch_size) > _LARGEST_PATCH:
            raise ValueError(f"patch_size must be positive, and at most {_LARGEST_PATCH} voxels in all")
        return self


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
        """What a stopped training goes on from; all that this training shows of finished epochs follows from it."""
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
    def begun(self) -> bool:
        """Whether its training was ever started, not only set up."""
        return self.environment_file.exists()

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
            text = read_bounded(self._own(self.config_file), _LARGEST_CONFIG).decode("utf-8")
            return RunConfig.model_validate(plain_yaml.load(text))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.path}: not a run folder (no config.yaml); name one that `train` wrote.") from None
        except (yaml.YAMLError, *DAMAGE) as error:
            detail = error.errors()[0]["msg"][:200] if isinstance(error, ValidationError) else "not valid YAML"
            raise InputError(f"{self.config_file}: damaged or of another version ({detail}); train anew.") from None

    def _own(self, file: Path) -> Path:
        """`file`; InputError when it is a link that leads out of the run folder."""
        if not lies_inside(self.path, file):
            raise InputError(f"{file}: a link that leads out of the run folder; copy what it leads to into it.")
        return file

    def write_config(self, config: RunConfig) -> None:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
        write_text_atomically(self.config_file, text)

    def save_weights(self, weights: Weights, state_dict: dict[str, Tensor]) -> None:
        # safetensors stores each tensor's own bytes, in the one order that every reader knows.
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
        content = save(plain, {_CHECKSUM: _checksum(plain)})
        with atomic_write(self.weights_file(weights)) as temporary:
            temporary.write_bytes(content)  # and not save_file, which turns a full disk into an error of its own

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the state to resume from: tensors, plain values, and dicts and lists of them."""
        with atomic_write(self.resume_file) as temporary:
            try:
                with temporary.open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:
                # torch's writer reports a full disk as a wrong position in its file.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load_state(self) -> dict[str, Any] | None:
        """What `save_state` wrote, on the CPU; None when the training did not come that far.

        Raises InputError when the file is damaged, or is gone although epochs were finished.
        """
        file = self.resume_file
        if not file.exists():
            if self.metrics_file.exists():
                raise InputError(f"{file}: gone, though epochs were finished; restore it, or train into a new --out.")
            return None
        state = read_torch_archive(self._own(file))
        if not isinstance(state, dict):
            raise InputError(f"{file}: damaged; restore it from a copy, or train into a new --out.")
        return state

    def load_model(self, weights: Weights = "last") -> SegmentationNetwork[Any]:
        """The trained network on the CPU in eval mode.

        Raises InputError when the run has no such weights (yet), or damaged ones, or those of another network.
        """
        config, file = self.config, self.weights_file(weights)
        try:
            with torch.device("meta"):  # the network's shapes alone: those of a hostile configuration fit nowhere
                expected = {name: (t.shape, t.dtype) for name, t in build_network(config.model).state_dict().items()}
        except (RuntimeError, TypeError, ValueError, OverflowError):
            raise InputError(f"{self.config_file}: describes a network of impossible size; train anew.") from None
        try:
            with safe_open(self._own(file), "pt") as stored:
                shapes = {name: torch.Size(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 (no dict)
                if shapes != {name: shape for name, (shape, _) in expected.items()}:
                    raise InputError(f"{file}: weights of another network than {self.config_file} describes.")
                state = {name: stored.get_tensor(name) for name in shapes}
                checksum = (stored.metadata() or {}).get(_CHECKSUM)
        except FileNotFoundError:
            raise InputError(f"{file}: no such weights; let the training of this run finish an epoch.") from None
        except (SafetensorError, OSError, *DAMAGE):
            raise InputError(f"{file}: damaged weights; restore the file or train anew.") from None
        whole = checksum in (None, _checksum(state))
        if not whole or any(tensor.dtype != expected[name][1] for name, tensor in state.items()):
            raise InputError(f"{file}: damaged weights; restore the file or train anew.")
        model = build_network(config.model)
        model.load_state_dict(state)
        return model.eval()

    def append_environment(self, description: dict[str, Any]) -> None:
        """Add to `environment.json`, which has one entry for every time the run was started or resumed."""
        write_text_atomically(self.environment_file, json.dumps([*self.read_environments(), description], indent=2))

    def read_environments(self) -> list[dict[str, Any]]:
        """The entries of `environment.json`, none before the first start; InputError when it is damaged."""
        return _read_json(self._own(self.environment_file), [])

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
        """The content of `resources.json`, nothing before the first epoch has finished; InputError when damaged."""
        return _read_json(self._own(self.resources_file), {})

    def write_metrics(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace `metrics.jsonl`: one record per finished epoch, one line per record."""
        write_text_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in records))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, one per finished epoch; InputError when it is damaged."""
        if not self.metrics_file.exists():
            return []
        try:
            content = read_bounded(self._own(self.metrics_file), _LARGEST_RECORDS)
            return [json.loads(line) for line in content.decode("utf-8").splitlines()]
        except (ValueError, RecursionError):
            raise InputError(f"{self.metrics_file}: damaged; a resumed training writes it anew.") from None


@contextmanager
def only_training_in(folder: Path) -> Iterator[None]:
    """Keep other trainings out of `folder`, a run's or one of several runs, while the block runs; a kill ends that too.

    Raises InputError while another one is at work there. Where the file system has no locks there is a warning only.
    """
    file = folder / ".lock"
    with ExitStack() as stack:
        try:
            mine = stack.enter_context(try_lock(file))
        except NoLocksError as error:
            warnings.warn(f"{error}: let no other training write to {folder}.", RuntimeWarning, stacklevel=3)
            mine = True
        if not mine:
            raise InputError(
                f"{folder}: another training ({holder(file)}) is writing there; wait for it, or name another --out."
            )
        yield


def find_runs(folder: Path) -> list[RunFolder]:
    """The run in `folder`, or the runs of the folds in it (`fold-K`); none where it holds neither."""
    files = (*folder.glob("config.yaml"), *sorted(folder.glob("fold-*/config.yaml")))
    return [RunFolder(file.parent) for file in files]


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of their names, types, shapes and bytes."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read_json(file: Path, default: T) -> T:
    """The content of a file that this program wrote, or `default` where there is none yet."""
    try:
        return json.loads(read_bounded(file, _LARGEST_RECORDS).decode("utf-8")) if file.exists() else default
    except (ValueError, RecursionError):
        raise InputError(f"{file}: damaged; restore it, or delete it.") from None
