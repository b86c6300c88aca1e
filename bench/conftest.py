"""What every benchmark shares: which backends run, on which device, and a result checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from utnetv2_fast.ops.dispatch import BACKENDS, explain

Results = Callable[[], tuple[Tensor, ...]]


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device(request.param)


@pytest.fixture(params=["eager", *BACKENDS])
def impl(request: pytest.FixtureRequest) -> str:
    """A backend of the operators, or "eager": the formula in plain PyTorch, differentiated by autograd."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def skip_refused() -> Callable[..., None]:
    def skip(impl: str, operator: Callable[..., Any], *tensors: Tensor) -> None:
        refusals = explain(operator, *tensors).refusals
        if impl in refusals:
            pytest.skip(refusals[impl])

    return skip


@pytest.fixture
def time_checked(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """Time `run` once its results are those of `exact` in float64 to `tolerance`, a share of the largest value."""

    def time(run: Results, exact: Results, *, tolerance: float, flops: int, bytes_moved: int) -> None:
        results = run()
        for result, expected in zip(results, exact(), strict=True):
            error = (result.double() - expected).abs().max() / expected.abs().max()
            assert error <= tolerance, f"wrong by {error:.2g}, so not timed"
        device = results[0].device

        def synchronised() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        benchmark.extra_info.update(flops=flops, bytes=bytes_moved, torch=torch.__version__, gpu=gpu)
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.pedantic(synchronised, warmup_rounds=2, rounds=10)

    return time
