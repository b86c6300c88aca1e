"""The layers that are compared do what they are called after, at the paper's cost; powers are those of the data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import utnetv2_fast.ops.flops  # noqa: F401
from utnetv2_fast.costs import operators
from utnetv2_fast.costs.measure import in_a_process
from utnetv2_fast.costs.operators import (
    KERNEL,
    MAP_SIDE,
    OPERATORS,
    WINDOW,
    Growth,
    SelfAttention,
    WindowAttention,
    fitted_exponent,
    grow,
    measure_operators,
)
from utnetv2_fast.costs.tables import growth_records, operator_rows
from utnetv2_fast.errors import RunError
from utnetv2_fast.nn.bidirectional_attention import merge_heads, split_heads

CPU = torch.device("cpu")


def explicit(layer: SelfAttention | WindowAttention, x: Tensor, allowed: Tensor) -> Tensor:
    """Attention over all positions by the full matrix; `allowed` (n, n)."""
    q, k, v = (split_heads(t, layer.heads) for t in layer.qkv(x).chunk(3, dim=1))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    attended = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v
    return layer.out(merge_heads(attended, tuple(x.shape[2:])))


@pytest.mark.parametrize("fused", [True, False])
def test_self_attention_is_that_of_all_positions(fused: bool) -> None:
    layer, x = SelfAttention(64, fused=fused).double(), torch.randn(2, 64, 6, 5).double()
    torch.testing.assert_close(layer(x), explicit(layer, x, torch.ones(30, 30, dtype=torch.bool)))


@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_stays_within_windows(shifted: bool) -> None:
    layer, x = WindowAttention(64, shifted=shifted).double(), torch.randn(2, 64, 2 * WINDOW, 3 * WINDOW).double()
    shift = WINDOW // 2 if shifted else 0
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in x.shape[2:]), indexing="ij")
    window = ((rows + WINDOW - shift) // WINDOW * 100 + (columns + WINDOW - shift) // WINDOW).flatten()
    torch.testing.assert_close(layer(x), explicit(layer, x, window[:, None] == window))


@pytest.mark.parametrize("name", OPERATORS)
def test_parameters_and_operations_are_the_papers(name: str) -> None:
    d, side = 64, 16
    n, l = side * side, MAP_SIDE**2
    operator = OPERATORS[name]
    layer = operator.make(d)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        assert layer(torch.randn(1, d, side, side)).shape == (1, d, side, side)
    parameters, flops = operator.parameters(d), 2 * operator.complexity(n, d)
    if name == "b-mha":  # the paper leaves out the depthwise convolutions and the projections of the semantic map
        parameters += 2 * KERNEL**2 * d
        flops += 2 * (2 * KERNEL**2 * n * d + 3 * l * d**2)
    assert sum(p.numel() for p in layer.parameters()) == parameters
    assert counter.get_total_flops() == flops


def test_a_power_is_fitted_over_the_largest_sizes() -> None:
    positions = [16**2, 32**2, 64**2, 96**2, 128**2]
    values = [5.0, *(3e-3 * n**1.5 for n in positions[1:])]  # the smallest pays something else
    assert fitted_exponent(positions, values) == pytest.approx(1.5)
    assert fitted_exponent(positions[:3], [2.0, None, 2.0]) == pytest.approx(0)
    assert math.isnan(fitted_exponent(positions[:2], [None, 1.0]))
    assert math.isnan(fitted_exponent([1], [1.0]))


def test_growth_ends_before_what_would_take_too_long() -> None:
    assert len(grow("mhsa", "cpu", 32, 1, (8, 64), 0.0)) == 1
    found = grow("conv", "cpu", 32, 1, (8, 16), 60.0)
    assert len(found) == 2
    assert all(took > 0 for took, _ in found)


def test_every_operator_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "in_a_process", lambda module, function, *arguments: grow(*arguments))
    growths = measure_operators(CPU, channels=32, sides=(8, 16), longest=60)
    assert [growth.operator for growth in growths] == list(OPERATORS)
    assert all(growth.positions == [64, 256] for growth in growths)
    assert len(growth_records(growths)) == 2 * len(OPERATORS)
    rows = operator_rows(growths)
    assert rows[-1][0] == "B-MHA"
    assert rows[-1][2] == "6d² = 6144"
    assert {row[3] for row in rows[1:]} == {"16²"}


def test_memory_grows_over_sizes_that_take_more_than_the_process_itself() -> None:
    def memory(*peaks: int | None) -> float:
        positions = [16, 64, 256, 1024][: len(peaks)]
        ones = [1] * len(peaks)
        return Growth("a", "a", "n", 1, 1, "d", positions, [1.0] * len(peaks), list(peaks), ones).exponents["memory"]

    assert memory(1000, 1001, 4000, 16000) == pytest.approx(1)
    assert math.isnan(memory(1000, 1001, 1400, 4000))
    assert math.isnan(memory(0, 1000, 1000, 1400))
    assert math.isnan(memory(None, None))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL; a smaller batch"),
        ("raise MemoryError('no room')", "failed: MemoryError: no room; a smaller batch"),
        ("raise SystemExit(3)", "failed: it ended with 3; a smaller batch"),
    ],
)
def test_a_process_that_ends_early_is_a_failure_in_one_sentence(code: str, message: str) -> None:
    with pytest.raises(RunError, match=message) as failure:
        in_a_process("builtins", "exec", code)
    assert "\n" not in str(failure.value)


def test_a_row_says_where_it_stopped() -> None:
    whole = Growth("a", "a", "n", 1, 1, "d", [16, 64, 256], [0.25, 1.0, 4.0], [2, 10, 40], [1, 4, 16])
    short = Growth("b", "b", "n²", 1, 1, "d", [64], [1.0], [None], [1])
    _, first, second = operator_rows([whole, short])
    assert first[3:7] == ["16²", "1.00", "1.00", "1.00"]
    assert second[3:7] == ["8², stopped", "-", "-", "-"]
