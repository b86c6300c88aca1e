"""Sums over the ranks of a data-parallel training, with gradients; one process needs neither these nor a group.

Backward adds the gradients of all ranks, each of its own copy of the sum: what it computes on every rank are gradients
of the sum of all ranks' losses. DistributedDataParallel divides them by the number of ranks. Where every rank has the
loss of the whole batch, the result is the gradient of that loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def in_process_group() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's `x`, of one shape; in a program without a process group, `x`."""
    return _SumOverRanks.apply(x) if in_process_group() else x


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def gather_samples(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (ranks * B, ...), the samples of all ranks in the order of the ranks; needs a group."""
    before, after = dist.get_rank() * len(x), (dist.get_world_size() - 1 - dist.get_rank()) * len(x)
    return sum_over_ranks(F.pad(x, (0, 0) * (x.ndim - 1) + (before, after)))
