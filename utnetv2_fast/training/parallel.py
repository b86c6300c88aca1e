"""A training on several processes: the group that they form, and each one's part of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utnetv2_fast.errors import InputError, RunError
from utnetv2_fast.nn.across_ranks import in_process_group
from utnetv2_fast.nn.normalised_conv import use_global_batch_norms
from utnetv2_fast.ranks import Ranks

# Longer than rank 0 takes for a report, or a compiler for the first step; a rank that hangs ends the others by then.
_TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Within the block the ranks can exchange tensors: on a CPU by gloo, on GPUs by NCCL. One process has no group.

    Raises:
        InputError: the job was not started by torchrun, or `device` is of a kind that cannot take part.
        RunError: another rank ended or cannot be reached.
    """
    if ranks.count == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise InputError(f"{ranks.count} processes were started, but not to train together; start them by torchrun.")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {device.type} cannot train in several processes; use --device cpu, or one process.")
    try:
        # The small things that are agreed on lie on the CPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT, rank=ranks.rank, world_size=ranks.count)
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise RunError(
            f"Rank {ranks.rank} of {ranks.count} has lost another one, which says why if it could; mend that, then go "
            "on with the run by --resume: what was saved before is whole."
        ) from error
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    """Gloo's errors have no class of their own, but name the file of its sources."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def part_of_batch(batch_size: int, ranks: Ranks) -> range:
    """The samples of a batch that this rank takes; InputError when they cannot be divided evenly."""
    if batch_size % ranks.count:
        raise InputError(
            f"A batch of {batch_size} cannot be divided evenly among {ranks.count} processes; start a number of them "
            "that divides it, or a new training with another --batch-size."
        )
    size = batch_size // ranks.count
    return range(ranks.rank * size, (ranks.rank + 1) * size)


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """`network`, with its batch norms made global, to be called on parts of a batch; gradients are those of the whole.

    The loss must be that of the whole batch on every rank (`training.losses`).
    """
    use_global_batch_norms(network)
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; all ask together."""
    if not in_process_group():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def same_on_all_ranks(number: int) -> bool:
    """Whether all ranks have the same number; all ask together."""
    ends = torch.tensor([number, -number])
    if in_process_group():
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


def add_counts(counts: Tensor) -> None:
    """Make `counts`, integers on the CPU, the sum of every rank's."""
    if in_process_group():
        dist.all_reduce(counts)


def wait_for_all() -> None:
    """Return once every rank has come here."""
    if in_process_group():
        dist.barrier()
