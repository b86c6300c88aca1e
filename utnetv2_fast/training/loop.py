"""The training loop: from a prepared fold to weights, metrics and a state to resume from, all in the run folder."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn

from utnetv2_fast.data.augment import PROFILES, augment, source_size
from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.data.sampling import PatchSampler, prefetch
from utnetv2_fast.devices import autocast_dtype
from utnetv2_fast.errors import InputError, RunError
from utnetv2_fast.files import atomic_write
from utnetv2_fast.models import UTNetV2
from utnetv2_fast.ops.self_check import check_kernels
from utnetv2_fast.training.config import TrainingConfig
from utnetv2_fast.training.losses import supervised_loss
from utnetv2_fast.training.run_folder import RunConfig, RunFolder
from utnetv2_fast.training.schedule import learning_rate_factor

_NORM_BATCHES = 8  # from which batch norms get the statistics of the averaged weights


@dataclass(frozen=True)
class Progress:
    """Where a training is; given to `watch` after every step. `dice` is that of the last finished epoch."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    dice: float | None
    seconds_left: float


def ignore_progress(progress: Progress) -> None:
    """The default `watch`."""


def ignore_epoch(network: torch.nn.Module) -> None:
    """The default `after_epoch`."""


class _State:
    """What changes during a training and must survive an interruption. Batches and augmentation depend on the step."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        settings = config.training
        torch.manual_seed(settings.seed)
        self.model = UTNetV2(config.model).to(device)
        self.averaged = AveragedModel(self.model, multi_avg_fn=_ema(settings.ema_decay))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, eps=1e-5, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: learning_rate_factor(
                step,
                steps=settings.steps,
                warmup_steps=settings.warmup_steps,
                schedule=settings.schedule,
            ),
        )
        self.epoch = 0
        self.best_dice = -1.0
        self.seconds = 0.0

    @property
    def network(self) -> UTNetV2:
        """The network with averaged weights."""
        return cast(UTNetV2, self.averaged.module)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "best_dice": self.best_dice,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.best_dice, self.seconds = state["epoch"], state["best_dice"], state["seconds"]


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average that begins as the plain mean, so that the first weights are soon forgotten."""

    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        torch._foreach_lerp_(averages, current, 1 - min(decay, float(count) / (float(count) + 1)))

    return update


def train(
    run: RunFolder,
    train_cases: Sequence[PreparedCase],
    validation_cases: Sequence[PreparedCase],
    device: torch.device,
    *,
    watch: Callable[[Progress], None] = ignore_progress,
    after_epoch: Callable[[torch.nn.Module], None] = ignore_epoch,
) -> UTNetV2:
    """Train to the end of the last epoch and return the network with averaged weights, in eval mode on `device`.

    After every epoch `run` holds the averaged weights (`last`, and `best` by the validation patches' Dice), a line of
    metrics, and a state to resume from; where it holds such a state already, training goes on from there. Batches and
    their augmentation depend on the seed and the step alone. Then `after_epoch` gets the network with averaged weights
    in eval mode, to look at and not to change.

    Raises:
        RunError: the loss is not finite; names the cases of the batch.
        InputError: the state in `run` is damaged or that of another network.
    """
    config = run.config
    settings = config.training
    state = _State(config, device)
    if run.resume_file.exists():
        _load(run, state)
    run.keep_metrics_before(state.epoch)
    dtype = training_dtype(settings, device)
    if config.model.impl != "reference":
        check_kernels(device, dtype)
    weights = torch.ones(config.model.num_classes, device=device)
    weights[0] = settings.background_weight
    batch = _batches(config, train_cases, device)
    # The parameters stay the model's own, under their own names; sizes never change.
    network = torch.compile(state.model, dynamic=False) if settings.compile else state.model
    fit_norms = _norm_fitting(settings, batch, device, dtype)
    validate = _validation(config, validation_cases, device, dtype)
    dice: float | None = None

    started, resumed_seconds = time.perf_counter(), state.seconds
    first = state.epoch * settings.steps_per_epoch
    prefetched = prefetch(batch, range(first, settings.steps))
    for epoch in range(state.epoch, settings.epochs):
        state.model.train()
        total = 0.0
        for image, label, cases in itertools.islice(prefetched, settings.steps_per_epoch):
            rate = state.schedule.get_last_lr()[0]
            loss = _step(state, network, image, label, cases, weights, settings, dtype)
            total += loss
            step = state.schedule.last_epoch
            elapsed = time.perf_counter() - started
            left = elapsed / (step - first) * (settings.steps - step)
            watch(Progress(step, settings.steps, epoch + 1, settings.epochs, loss, dice, left))
        fit_norms(state.averaged)
        dice, per_class = validate(state.averaged)
        state.epoch = epoch + 1
        state.seconds = resumed_seconds + time.perf_counter() - started
        if dice > state.best_dice:
            state.best_dice = dice
            run.save_weights("best", state.network.state_dict())
        run.save_weights("last", state.network.state_dict())
        record = {
            "epoch": epoch,
            "step": state.epoch * settings.steps_per_epoch,
            "learning_rate": rate,
            "loss": total / settings.steps_per_epoch,
            "dice": dice,
            "dice_per_class": per_class,
            "seconds": round(state.seconds, 3),
        }
        run.append_metrics(record)
        with atomic_write(run.resume_file) as temporary:
            torch.save(state.state_dict(), temporary)
        after_epoch(state.network)
    return state.network.eval()


def _load(run: RunFolder, state: _State) -> None:
    try:
        # By way of the CPU: a GPU would keep the optimiser's step counters, and each step would wait for every one.
        state.load_state_dict(torch.load(run.resume_file, map_location="cpu", weights_only=True))
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError, UnpicklingError):
        raise InputError(
            f"{run.resume_file}: damaged, or the state of another network; train into a new --out."
        ) from None


def training_dtype(settings: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for plain float32."""
    if settings.precision == "auto":
        return autocast_dtype(device)
    return torch.bfloat16 if settings.precision == "bfloat16" else None


def _batches(
    config: RunConfig, cases: Sequence[PreparedCase], device: torch.device
) -> Callable[[int], tuple[Tensor, Tensor, tuple[str, ...]]]:
    """step -> augmented image (B, C, *patch), label (B, *patch) on `device`, names of the cases."""
    settings, profile = config.training, PROFILES[config.training.augmentation]
    spacing = tuple(s for s in config.plan.spacing[-config.model.dimensions :] if s is not None)
    sampler = PatchSampler(
        cases=cases,
        patch_size=config.patch_size,
        source_size=source_size(config.patch_size, profile, spacing),
        batch_size=settings.batch_size,
        seed=settings.seed,
        foreground_fraction=settings.foreground_fraction,
    )

    def batch(step: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        read = sampler.batch(step)
        image, label = augment(
            read.image.to(device), read.label.to(device), config.patch_size, spacing, profile, (settings.seed, step)
        )
        return image, label, read.cases

    return batch


def _step(
    state: _State,
    network: Callable[[Tensor], Any],
    image: Tensor,
    label: Tensor,
    cases: tuple[str, ...],
    class_weights: Tensor,
    settings: TrainingConfig,
    dtype: torch.dtype | None,
) -> float:
    """One optimiser step on `network`, which is the state's model as it is run; the loss."""
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        outputs = network(image)
    loss = supervised_loss(outputs, label, class_weights, settings.auxiliary_weight)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_norm)
    if not torch.isfinite(loss + norm):
        raise RunError(
            f"Step {state.schedule.last_epoch}: the loss ({loss.item()}) or its gradient is not finite; look at the "
            f"cases of this batch ({', '.join(dict.fromkeys(cases))}), or train with a lower learning rate."
        )
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.schedule.step()
    state.averaged.update_parameters(state.model)
    return loss.item()


def _norm_fitting(
    settings: TrainingConfig,
    batch: Callable[[int], tuple[Tensor, Tensor, tuple[str, ...]]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Callable[[torch.nn.Module], None]:
    """A function that gives the batch norms of averaged weights statistics of their own, of a few further batches.

    The running statistics of the latest weights do not fit the average of many: with them acdc-2d, after 350 steps on
    ACDC, had a Dice of 0.12 where its own statistics gave 0.82.
    """
    images: list[Tensor] = []

    def fit(model: torch.nn.Module) -> None:
        if not any(isinstance(module, _BatchNorm) for module in model.modules()):
            return
        if not images:
            images.extend(batch(step)[0] for step in range(settings.steps, settings.steps + _NORM_BATCHES))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            update_bn(images, model)

    return fit


def _validation(
    config: RunConfig, cases: Sequence[PreparedCase], device: torch.device, dtype: torch.dtype | None
) -> Callable[[torch.nn.Module], tuple[float, list[float | None]]]:
    """model -> mean foreground Dice and Dice per foreground class over fixed patches of the held-out cases.

    Half the patches lie on foreground; counts are pooled over all of them. A class that occurs in none has None.
    """
    settings, classes = config.training, config.model.num_classes
    sampler = PatchSampler(
        cases=cases,
        patch_size=config.patch_size,
        source_size=config.patch_size,
        batch_size=settings.batch_size,
        seed=settings.seed,
        foreground_fraction=0.5,
    )
    # A tenth of the training steps; a forward pass takes about a third of a step.
    batches = [sampler.batch(step) for step in range(max(4, settings.steps_per_epoch // 10))]

    @torch.no_grad()
    def validate(model: torch.nn.Module) -> tuple[float, list[float | None]]:
        model.eval()
        counts = torch.zeros(3, classes, dtype=torch.int64)  # of the overlap, the prediction, the reference
        for batch in batches:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(batch.image.to(device))
            predicted, reference = logits.argmax(1).cpu(), batch.label.long()
            for row, labels in enumerate((predicted[predicted == reference], predicted, reference)):
                counts[row] += torch.bincount(labels.flatten(), minlength=classes)
        overlap, total = counts[0, 1:], counts[1, 1:] + counts[2, 1:]
        per_class = [2 * int(o) / int(t) if t else None for o, t in zip(overlap, total, strict=True)]
        present = [dice for dice in per_class if dice is not None]
        return sum(present) / max(1, len(present)), per_class

    return validate
