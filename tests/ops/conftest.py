"""How accurate an operator must be: measured against float64, with plain PyTorch in the same dtype as the yardstick."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    def check(result: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 2.0) -> None:
        """Largest error <= factor * that of `eager`, plus a few roundings of the largest exact value to the dtype.

        One rounding is all that a low-precision result costs beyond its products. In float32 the order of the sums
        decides more than that, and in float64 the yardstick has rounding errors of its own.
        """
        assert result.shape == exact.shape
        assert result.dtype == eager.dtype
        assert result.isfinite().all()
        if exact.numel() == 0:
            return
        error = (result.double() - exact).abs().max().item()
        bound = factor * (eager.double() - exact).abs().max().item()
        roundings = {torch.float32: 8, torch.float64: 100}.get(result.dtype, 1)
        bound += roundings * torch.finfo(result.dtype).eps * exact.abs().max().item()
        assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"

    return check
