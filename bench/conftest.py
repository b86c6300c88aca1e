"""What every benchmark of an operator shares: ours and its peers checked, then timed in turn; a table at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench.measure, also where the package is imported from elsewhere

from bench.measure import Roof, machine, measure_roof, seconds, table
from bench.peers import TOLERANCES

Results = Callable[[], tuple[Tensor, ...]]
Peer = Sequence[Results] | str  # the best of these, or why there is none

SECONDS_PER_ROW = 1.5


@dataclass
class Row:
    """One line of the table: what was computed, how fast, and the peers' times (or why they have none)."""

    operator: str
    case: tuple[str, ...]
    backend: str
    seconds: float
    flops: float
    bytes: float
    roof: Roof
    peers: dict[str, float | str] = field(default_factory=dict)


ROWS: list[Row] = []


def pytest_configure(config: pytest.Config) -> None:
    machine()  # keeps freed memory from now on, as the command line does


@pytest.fixture(scope="session", params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if request.param == "bfloat16" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("bfloat16 is emulated on a processor without AVX512_BF16")
    return getattr(torch, request.param)


@pytest.fixture(scope="session")
def roof(device: torch.device) -> Callable[[torch.dtype], Roof]:
    measured: dict[torch.dtype, Roof] = {}

    def of(dtype: torch.dtype) -> Roof:
        if dtype not in measured:
            measured[dtype] = measure_roof(dtype, device)
        return measured[dtype]

    return of


@pytest.fixture(scope="session")
def compiler_refusal(device: torch.device) -> str | None:
    """Why torch.compile does not work here; None where it does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception as error:  # whatever a compiler that is missing or broken makes torch raise
        return f"torch.compile: {type(error).__name__}"
    return None


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def compare(
    benchmark: BenchmarkFixture, device: torch.device, dtype: torch.dtype, roof: Callable[[torch.dtype], Roof]
) -> Callable[..., None]:
    """Time `ours`, once it gives `exact` of float64, and in turn with it those peers that do."""

    def error_of(run: Results, exact: Sequence[Tensor], compared: Callable[[Tensor], Tensor]) -> float:
        errors = [
            (compared(result).double() - expected).abs().max() / expected.abs().max()
            for result, expected in zip(run(), exact, strict=True)
        ]
        return torch.stack(errors).max().item()  # NaN is the largest

    def time(
        operator: str,
        case: tuple[str, ...],
        backend: str,
        ours: Results,
        peers: Mapping[str, Peer],
        exact: Sequence[Tensor],
        *,
        flops: float,
        bytes_moved: float,
        compared: Callable[[Tensor], Tensor] = lambda result: result,
    ) -> None:
        error = error_of(ours, exact, compared)
        assert error <= TOLERANCES[dtype], f"ours is wrong by {error:.2g}, so not timed"
        runs = {name: [] if isinstance(peer, str) else list(peer) for name, peer in peers.items()}
        distinct = list(dict.fromkeys(run for several in runs.values() for run in several))
        wrong = {run: e for run in distinct if not (e := error_of(run, exact, compared)) <= TOLERANCES[dtype]}
        distinct = [run for run in distinct if run not in wrong]
        refusals = {name: peer for name, peer in peers.items() if isinstance(peer, str)}
        for name, several in runs.items():
            runs[name] = [run for run in several if run not in wrong]
            if several and not runs[name]:
                refusals[name] = f"{name} is wrong by {max(wrong[run] for run in several):.2g} there, so not timed"
        once = sum(seconds(run, device) for run in [ours, *distinct])
        rounds = min(max(math.ceil(SECONDS_PER_ROW / once), 5), 50)
        best = dict.fromkeys(distinct, math.inf)

        def time_peers() -> None:
            for run in distinct:
                best[run] = min(best[run], seconds(run, device))

        def run_ours() -> None:
            ours()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.pedantic(run_ours, setup=time_peers, rounds=rounds)  # between any two rounds the peers have theirs
        results = {name: refusals[name] if name in refusals else min(best[run] for run in runs[name]) for name in peers}
        benchmark.extra_info.update(flops=flops, bytes=bytes_moved, backend=backend, peers=results, **machine())
        took = benchmark.stats.stats.min
        ROWS.append(Row(operator, case, backend, took, flops, bytes_moved, roof(dtype), results))

    return time


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("benchmarks")
    for key, value in machine().items():
        write(f"{key}: {value}")
    for dtype_roof in dict.fromkeys(row.roof for row in ROWS):
        write(
            f"roof: {dtype_roof.flops / 1e9:.0f} GFLOP/s in a matrix product or dense convolution, "
            f"{dtype_roof.bytes / 1e9:.1f} GB/s in a copy"
        )
    write("shortest times; x PEER: how many times as long the peer takes")
    for operator in dict.fromkeys(row.operator for row in ROWS):
        rows = [row for row in ROWS if row.operator == operator]
        peers = list(dict.fromkeys(name for row in rows for name in row.peers))
        header = ["shape", "layout", "mode", "backend", "ms", "GFLOP/s", "GB/s", "% roof", *(f"x {p}" for p in peers)]
        write("")
        write(f"{operator}:")
        for line in table(header, [_cells(row, peers) for row in rows]).splitlines():
            write(line)
        for reason in dict.fromkeys(p for row in rows for p in row.peers.values() if isinstance(p, str)):
            write(f"-: {reason}")


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    share = row.roof.seconds(row.flops, row.bytes) / row.seconds
    ratios = []
    for name in peers:
        peer = row.peers.get(name, "")
        ratios.append("-" if isinstance(peer, str) else f"{peer / row.seconds:.2f}")
    rates = [f"{row.flops / row.seconds / 1e9:.1f}", f"{row.bytes / row.seconds / 1e9:.1f}", f"{100 * share:.0f}"]
    return [*row.case, row.backend, f"{1000 * row.seconds:.3f}", *rates, *ratios]
