"""A process knows its rank by torchrun or srun, and takes nothing else for one."""

from __future__ import annotations

import pytest

from utnetv2_fast.errors import InputError
from utnetv2_fast.ranks import ALONE, Ranks, ranks_of_this_job

SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        (TORCHRUN, Ranks(1, 2, 0)),
        (SLURM, Ranks(2, 4, 1)),
        (SLURM | TORCHRUN, Ranks(1, 2, 0)),  # torchrun within srun
        ({"RANK": "1"}, ALONE),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, ALONE),  # a batch script, outside srun
    ],
)
def test_who_says_so(environment: dict[str, str], expected: Ranks) -> None:
    assert ranks_of_this_job(environment) == expected
    assert expected.first == (expected.rank == 0)


@pytest.mark.parametrize("changes", [{"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "many"}])
def test_contradictions_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"RANK=.* WORLD_SIZE="):
        ranks_of_this_job(TORCHRUN | changes)
