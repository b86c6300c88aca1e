"""What only a GPU can show: kernels that touch no memory but their own, and no data race."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

WORK = """
import torch
from utnetv2_fast.ops.self_check import EXAMPLES, check
device = torch.device("cuda", 0)
for operator in EXAMPLES:
    for dtype in (torch.float32, torch.bfloat16):
        finding = check(operator, device, dtype, "triton")
        assert finding.problem is None, (operator.__name__, dtype, finding.problem)
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", WORK]
    root = Path(__file__).parents[1]
    # Without torch's cache every tensor is an allocation of its own, past whose end an access is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
