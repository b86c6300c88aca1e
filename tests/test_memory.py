"""What a process has taken at most is measured where the system tells."""

from __future__ import annotations

import sys

import pytest
import torch

from utnetv2_fast.memory import peak_memory


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_peak_memory_is_in_bytes_and_grows_with_what_is_taken() -> None:
    before = peak_memory(torch.device("cpu"))
    assert before["peak_gpu_memory_bytes"] is None
    assert before["peak_memory_bytes"] is not None
    assert 2**26 < before["peak_memory_bytes"] < 2**40
    size = before["peak_memory_bytes"] + 2**26
    taken = torch.ones(min(size, 2**32), dtype=torch.uint8)
    after = peak_memory(torch.device("cpu"))["peak_memory_bytes"]
    assert after is not None
    assert after > before["peak_memory_bytes"]
    del taken
