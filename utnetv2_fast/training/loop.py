"""The training loop: from a prepared fold to weights, metrics and a state to resume from, all in the run folder."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from utnetv2_fast.data.augment import augment, augmentation_profile, source_size
from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.data.sampling import PatchSampler, prefetch
from utnetv2_fast.devices import autocast_dtype
from utnetv2_fast.errors import DivergedError, InputError, RunError, Stopped
from utnetv2_fast.files import remove_unfinished
from utnetv2_fast.models import SegmentationNetwork, load_pretrained
from utnetv2_fast.nn.normalised_conv import use_global_batch_norms
from utnetv2_fast.ops.self_check import check_kernels
from utnetv2_fast.ranks import ALONE, Ranks
from utnetv2_fast.training.config import TrainingConfig
from utnetv2_fast.training.losses import expand_class_weights, supervised_loss
from utnetv2_fast.training.parallel import add_counts, any_rank, data_parallel, part_of_batch, same_on_all_ranks
from utnetv2_fast.training.run_folder import RunConfig, RunFolder
from utnetv2_fast.training.state import TrainingState

_NORM_BATCHES = 8  # from which batch norms get the statistics of the averaged weights
_LEAST_VALIDATION_BATCHES = 4
_WARM_UP_STEPS, _TIMED_STEPS, _TIMED_SECONDS = 3, 5, 5.0  # of a step's measurement


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


def never() -> bool:
    """The default `stop`."""
    return False


def ignore_epoch(network: torch.nn.Module) -> None:
    """The default `after_epoch`."""


def train(
    run: RunFolder,
    train_cases: Sequence[PreparedCase],
    validation_cases: Sequence[PreparedCase],
    device: torch.device,
    *,
    watch: Callable[[Progress], None] = ignore_progress,
    stop: Callable[[], bool] = never,
    after_epoch: Callable[[torch.nn.Module], None] = ignore_epoch,
    ranks: Ranks = ALONE,
) -> SegmentationNetwork[Any]:
    """Train to the end of the last epoch and return the network with averaged weights, in eval mode on `device`.

    After every epoch `run` holds the averaged weights (`last`, and `best` by the validation patches' Dice) and a line
    of metrics; after every epoch, and every `checkpoint_minutes` within one, a state to resume from. Where it holds
    such a state already, training goes on from there. Batches and their augmentation depend on the seed and the step
    alone. When an epoch is saved, `after_epoch` gets the network with averaged weights in eval mode, to look at and not
    to change.

    Several `ranks` call it together within `process_group`, with a part of each batch each, and end with the weights of
    one process within rounding. The first writes and is the only one to call `watch` and `after_epoch`; `stop()` of any
    stops all. The state does not tell how many they were.

    The state is written first, and what is shown of an epoch follows from it: killed between the two, a training
    shows the rest when it is resumed.

    Raises:
        DivergedError: the loss is not finite (names the cases of the batch).
        RunError: a file cannot be written, or the ranks see different files.
        InputError: the state in `run` is damaged or that of another network, or the batch cannot be divided evenly, or
            the pre-trained weights cannot be used.
        Stopped: after a step `stop()` was true; the state is saved.
    """
    config = run.config
    settings = config.training
    part = part_of_batch(settings.batch_size, ranks)
    state = TrainingState(config, device)
    _resume(run, state)
    if not same_on_all_ranks(state.step):
        raise RunError(f"{run.resume_file}: rank {ranks.rank} sees another state than the rest; share one disk.")
    if ranks.first:
        remove_unfinished(run.path)
        _show_finished(run, state)
    else:
        torch.manual_seed(settings.seed + (ranks.rank << 40) + state.step)  # dropout draws for its own samples
    dtype = training_dtype(settings, device)
    network = _made_ready(config, state.model, len(part), device, dtype)
    weights = expand_class_weights(settings.class_weights, config.model.num_classes).to(device)
    batch = _batches(config, train_cases, device, part)
    if ranks.count > 1:
        network = data_parallel(network, device)
        use_global_batch_norms(state.averaged)
    fit_norms = _norm_fitting(settings, batch, device, dtype)
    validate = _validation(config, validation_cases, device, dtype, part)

    first, earlier_seconds = state.step, state.seconds
    started = saved = time.perf_counter()
    with closing(prefetch(batch, range(first, settings.steps))) as prefetched:
        for epoch in range(state.epoch, settings.epochs):
            end = (epoch + 1) * settings.steps_per_epoch
            dice = state.records[-1]["dice"] if state.records else None
            state.model.train()
            for image, label, cases in itertools.islice(prefetched, end - state.step):
                loss = _step(state, network, image, label, cases, weights, settings, dtype)
                state.loss_sum += loss
                now = time.perf_counter()
                state.seconds = earlier_seconds + now - started
                left = (now - started) / (state.step - first) * (settings.steps - state.step)
                if ranks.first:
                    watch(Progress(state.step, settings.steps, epoch + 1, settings.epochs, loss, dice, left))
                stopping = any_rank(stop())
                if stopping or now - saved >= 60 * settings.checkpoint_minutes:
                    if ranks.first:
                        with _writing():
                            run.save_state(state.state_dict())
                    saved = time.perf_counter()
                if stopping:
                    raise Stopped(f"Stopped after step {state.step} of {settings.steps}, all of it saved.")
            fit_norms(state.averaged)
            dice, per_class = validate(state.averaged)
            state.seconds = earlier_seconds + time.perf_counter() - started
            state.records.append(
                {
                    "epoch": epoch,
                    "step": end,
                    "learning_rate": state.learning_rate,
                    "loss": state.loss_sum / settings.steps_per_epoch,
                    "dice": dice,
                    "dice_per_class": per_class,
                    "seconds": round(state.seconds, 3),
                }
            )
            state.loss_sum = 0.0
            if ranks.first:
                with _writing():
                    run.save_state(state.state_dict())
                    _show_epoch(run, state)
                after_epoch(state.network)
            saved = time.perf_counter()
    return state.network.eval()


def seconds_per_step(config: RunConfig, train_cases: Sequence[PreparedCase], device: torch.device) -> float:
    """How long a training step of this run takes here once it has warmed up: the median of some, loading included."""
    settings = config.training
    state = TrainingState(config, device)
    dtype = training_dtype(settings, device)
    network = _made_ready(config, state.model, settings.batch_size, device, dtype)
    weights = expand_class_weights(settings.class_weights, config.model.num_classes).to(device)
    batch = _batches(config, train_cases, device, range(settings.batch_size))
    state.model.train()
    seconds: list[float] = []
    with closing(prefetch(batch, itertools.count())) as prefetched:
        finished = time.perf_counter()
        for step, (image, label, cases) in enumerate(prefetched):
            _step(state, network, image, label, cases, weights, settings, dtype)
            before, finished = finished, time.perf_counter()
            if step >= _WARM_UP_STEPS:
                seconds.append(finished - before)
            if len(seconds) >= _TIMED_STEPS and sum(seconds) >= _TIMED_SECONDS:
                return statistics.median(seconds)
    raise AssertionError("there is always another step")


def _made_ready(
    config: RunConfig, model: torch.nn.Module, samples: int, device: torch.device, dtype: torch.dtype | None
) -> torch.nn.Module:
    """`model` as it is run for batches of so many samples: its kernels checked, compiled where that is asked for.

    The parameters stay the model's own, under their own names.
    """
    if config.model.impl != "reference":
        check_kernels(model, (samples, config.model.in_channels, *config.patch_size), device, dtype)
    # Sizes never change.
    return cast(torch.nn.Module, torch.compile(model, dynamic=False)) if config.training.compile else model


def _resume(run: RunFolder, state: TrainingState) -> None:
    """Restore `state` from `run`; where nothing is stored yet, begin with pre-trained weights if the run names any.

    Raises InputError when what is stored is damaged or of another network, or was trained with other epochs; and what
    `load_pretrained` raises.
    """
    stored = run.load_state()
    if stored is None:
        if run.config.pretrained is not None:
            load_pretrained(state.model, Path(run.config.pretrained))
        return
    try:
        state.load_state_dict(stored)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{run.resume_file}: the state of another network or version; train into a new --out."
        ) from None
    per_epoch = run.config.training.steps_per_epoch
    shown = state.records[-1]["step"] if state.records else 0
    if shown != state.epoch * per_epoch or not shown <= state.step <= shown + per_epoch:
        raise InputError(f"{run.config_file}: steps_per_epoch is not what the run began with; put it back.")


def _show_finished(run: RunFolder, state: TrainingState) -> None:
    """Finish what a kill left undone between the state of a finished epoch and what is shown of it."""
    if state.records and state.step == state.records[-1]["step"]:
        with _writing():
            _show_epoch(run, state)


def _show_epoch(run: RunFolder, state: TrainingState) -> None:
    """Write weights and metrics of the epoch that `state` has just finished; the metrics last, as they announce it."""
    *earlier, latest = (record["dice"] for record in state.records)
    if all(latest > dice for dice in earlier):
        run.save_weights("best", state.network.state_dict())
    run.save_weights("last", state.network.state_dict())
    run.write_metrics(state.records)


@contextmanager
def _writing() -> Iterator[None]:
    """RunError for what is not written: the disk is full, say."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename}: cannot be written ({error.strerror}); mend that, then go on with the run by --resume: "
            "what was saved before is whole."
        ) from None


def training_dtype(settings: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for plain float32."""
    if settings.precision == "auto":
        return autocast_dtype(device)
    return torch.bfloat16 if settings.precision == "bfloat16" else None


def _batches(
    config: RunConfig, cases: Sequence[PreparedCase], device: torch.device, part: range
) -> Callable[[int], tuple[Tensor, Tensor, tuple[str, ...]]]:
    """step -> augmented image (B, C, *patch), label (B, *patch) on `device`, names of the cases; all of `part`."""
    settings, profile = config.training, augmentation_profile(config.training.augmentation)
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
        read = sampler.batch(step, part)
        source = read.image.to(device), read.label.to(device)
        image, label = augment(*source, config.patch_size, spacing, profile, (settings.seed, step), part.start)
        return image, label, read.cases

    return batch


def _step(
    state: TrainingState,
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
    loss = supervised_loss(outputs, label, class_weights, settings.auxiliary_weight, settings.dice)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_norm or math.inf)
    if not torch.isfinite(loss + norm):
        raise DivergedError(
            f"Step {state.step}: the loss ({loss.item()}) or its gradient is not finite; look at the "
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
        refitted = settings.norm_statistics == "refitted"
        if not refitted or not any(isinstance(module, _BatchNorm) for module in model.modules()):
            return
        if not images:
            images.extend(batch(step)[0] for step in range(settings.steps, settings.steps + _NORM_BATCHES))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            update_bn(images, model)

    return fit


def _validation(
    config: RunConfig, cases: Sequence[PreparedCase], device: torch.device, dtype: torch.dtype | None, part: range
) -> Callable[[torch.nn.Module], tuple[float, list[float | None]]]:
    """model -> mean foreground Dice and Dice per foreground class over fixed patches of the held-out cases.

    Half the patches lie on foreground; counts are pooled over all of them, of which this rank takes `part` of each
    batch. A class that occurs in none has None.
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
    steps = max(_LEAST_VALIDATION_BATCHES, settings.steps_per_epoch // 10)
    batches = [sampler.batch(step, part) for step in range(steps)]

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
        add_counts(counts)
        overlap, total = counts[0, 1:], counts[1, 1:] + counts[2, 1:]
        per_class = [2 * int(o) / int(t) if t else None for o, t in zip(overlap, total, strict=True)]
        present = [dice for dice in per_class if dice is not None]
        return sum(present) / max(1, len(present)), per_class

    return validate
