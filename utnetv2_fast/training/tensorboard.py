"""A run's metrics as TensorBoard shows them; `metrics.jsonl` stays the source of truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utnetv2_fast.errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def require_tensorboard() -> type[SummaryWriter]:
    """torch's writer of event files; InputError where the package `tensorboard` is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard needs the package tensorboard; install it with `pip install 'utnetv2-fast[tensorboard]'`, "
            "or leave the option out."
        ) from None
    return SummaryWriter


def tensorboard_log(folder: Path, labels: Sequence[str]) -> Callable[[Iterable[Mapping[str, Any]]], None]:
    """A function that takes all records of metrics so far and writes to `folder` those it has not written yet.

    `labels` names the foreground classes. What an earlier start of the run has written there is replaced.
    """
    writer = require_tensorboard()(str(folder), purge_step=0)
    written = 0

    def log(records: Iterable[Mapping[str, Any]]) -> None:
        nonlocal written
        for record in list(records)[written:]:
            written += 1
            scalars = {"loss": record["loss"], "learning rate": record["learning_rate"], "Dice/mean": record["dice"]}
            scalars |= {f"Dice/{label}": dice for label, dice in zip(labels, record["dice_per_class"], strict=True)}
            for name, value in scalars.items():
                if value is not None:
                    writer.add_scalar(name, value, record["epoch"] + 1)
        writer.flush()

    return log
