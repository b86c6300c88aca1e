"""Which of the processes of a job this one is: as torchrun or SLURM's srun say it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from utnetv2_fast.errors import InputError

# (rank, number of ranks, rank within the machine). SLURM_NTASKS will not do: it is set in a batch script too, where
# one process runs that would then do its part of the work only.
_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `count` in its job, and number `local` on its machine, from 0."""

    rank: int
    count: int
    local: int

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what is written once, and speaks for all."""
        return self.rank == 0


ALONE = Ranks(rank=0, count=1, local=0)


def ranks_of_this_job(environment: Mapping[str, str] = os.environ) -> Ranks:
    """What torchrun (RANK, WORLD_SIZE) or else srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS) says; `ALONE` without either.

    Raises InputError when they contradict themselves.
    """
    for rank_variable, count_variable, local_variable in _VARIABLES:
        if rank_variable not in environment or count_variable not in environment:
            continue
        values = [environment.get(name, "0") for name in (rank_variable, count_variable, local_variable)]
        if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
            raise InputError(
                f"{rank_variable}={values[0]} and {count_variable}={values[1]} in the environment are not a rank and "
                "the number of ranks; unset them, or start by torchrun or srun."
            )
        return Ranks(*map(int, values))
    return ALONE
