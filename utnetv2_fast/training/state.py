"""What a training carries from one step to the next, saved and restored as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from utnetv2_fast.models import SegmentationNetwork, build_network
from utnetv2_fast.training.run_folder import RunConfig
from utnetv2_fast.training.schedule import learning_rate_factor


class TrainingState:
    """Everything that a later step depends on; batches and their augmentation depend on the seed and the step alone.

    records   one per finished epoch: the lines of `metrics.jsonl`
    loss_sum  of the losses of the steps since the last finished epoch
    seconds   that the training took so far, without the time in which it lay stopped
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """A training that has not begun. Seeds torch's global generators, from which the weights are drawn."""
        settings = config.training
        torch.manual_seed(settings.seed)
        self.device = device
        self.model = build_network(config.model).to(device)
        self.averaged = AveragedModel(self.model, multi_avg_fn=_ema(settings.ema_decay))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            eps=1e-5,
            weight_decay=settings.weight_decay,
            fused=True,  # on a CPU too the others pass over the weights a dozen times
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: learning_rate_factor(
                step,
                steps=settings.steps,
                warmup_steps=settings.warmup_steps,
                schedule=settings.schedule,
                steps_per_epoch=settings.steps_per_epoch,
            ),
        )
        self.records: list[dict[str, Any]] = []
        self.loss_sum = 0.0
        self.seconds = 0.0

    @property
    def network(self) -> SegmentationNetwork[Any]:
        """The network with averaged weights."""
        return cast(SegmentationNetwork[Any], self.averaged.module)

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.schedule.last_epoch

    @property
    def epoch(self) -> int:
        """How many epochs were finished, validation included."""
        return len(self.records)

    @property
    def learning_rate(self) -> float:
        """Of the latest step."""
        return float(self.schedule.base_lrs[0] * self.schedule.lr_lambdas[0](self.step - 1))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which `torch.load(weights_only=True)` reads."""
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "records": self.records,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            # The global generators, for layers that draw from them in training, as dropout does.
            "cpu_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises one of several errors when `state` is that of another network, or not one that `state_dict` made."""
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.records, self.loss_sum, self.seconds = state["records"], state["loss_sum"], state["seconds"]
        cpu_generator, cuda_generator = state["cpu_generator"], state["cuda_generator"]
        torch.set_rng_state(cpu_generator)
        if self.device.type == "cuda" and cuda_generator is not None:
            torch.cuda.set_rng_state(cuda_generator, self.device)


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average that begins as the plain mean, so that the first weights are soon forgotten."""

    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        torch._foreach_lerp_(averages, current, 1 - min(decay, float(count) / (float(count) + 1)))

    return update
