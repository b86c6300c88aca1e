"""Costs of networks: counts are those of the network that runs, and what cannot be measured says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import utnetv2_fast.ops.flops  # noqa: F401
from utnetv2_fast.costs import networks
from utnetv2_fast.costs.networks import count, measure_networks, network_names, read_scores, task_of
from utnetv2_fast.costs.tables import csv_text, network_rows
from utnetv2_fast.errors import InputError, RunError
from utnetv2_fast.models import NETWORKS, Task, build_network, configure_network, get_preset

CPU = torch.device("cpu")


def task(preset: str, size: tuple[int, ...]) -> Task:
    return task_of(get_preset(preset), size, 2, 3)


@pytest.mark.parametrize(("preset", "size"), [("tiny-2d", (48, 40)), ("tiny-3d", (16, 16, 32))])
def test_counts_are_those_of_the_network_that_runs(preset: str, size: tuple[int, ...]) -> None:
    config = configure_network("utnetv2", task(preset, size))
    network = build_network(config).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 2, *size))
    assert count(config, size) == (sum(p.numel() for p in network.parameters()), counter.get_total_flops())


def test_attention_of_torch_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2).mT
            return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    monkeypatch.setattr(networks, "build_network", lambda _: Attention())
    assert count(configure_network("utnetv2", task("tiny-2d", (32, 32))), (8, 8)) == (0, 2 * 2 * 64 * 64 * 2)


def test_counting_takes_no_memory_and_draws_no_numbers() -> None:
    before = torch.get_rng_state()
    parameters, flops = count(configure_network("utnetv2", task("lits-3d", (128, 128, 128))), (128, 128, 128))
    assert parameters > 3e7
    assert flops > 1e11
    assert torch.equal(torch.get_rng_state(), before)


def test_time_and_memory_are_measured() -> None:
    small = task("tiny-2d", (32, 32))
    (cost,) = measure_networks(["utnetv2"], small, CPU, batch_size=2, train=True)
    assert cost.problem is None
    assert cost.forward_seconds is not None
    assert cost.step_seconds is not None
    assert 0 < cost.forward_seconds < cost.step_seconds
    assert cost.peak_bytes is not None
    assert cost.peak_bytes > 0
    header, row = network_rows([cost])
    assert header == ["network", "params M", "GFLOP", "forward ms", "step ms", "peak GiB"]
    assert row[0] == "UTNetV2"


def test_a_network_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(task: Task, width: int) -> Any:
        raise InputError("Swin UNETR is MONAI's: pip install monai.")

    choice = NETWORKS["utnetv2"]
    monkeypatch.setitem(NETWORKS, "swin", choice._replace(title="Swin UNETR", configure=absent))
    monkeypatch.setattr(networks, "in_a_process", lambda *_: {"forward_seconds": 0.5, "peak_bytes": 2**30})
    assert network_names([], 2) == [name for name, choice in NETWORKS.items() if 2 in choice.dimensions]
    costs = measure_networks(["utnetv2", "swin"], task("tiny-2d", (32, 32)), CPU)
    rows = network_rows(costs)
    assert rows[0] == ["network", "params M", "GFLOP", "forward ms", "peak GiB", "remark"]
    assert rows[1][3:] == ["500", "1.00", ""]
    assert rows[2] == ["Swin UNETR", "", "", "", "", "needs monai"]
    assert "swin,Swin UNETR,Swin UNETR is MONAI's: pip install monai.,,,,,\r\n" in csv_text(networks.as_json(costs))


def test_a_network_that_is_too_large_keeps_its_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> None:
        raise RunError("the process was ended by SIGKILL.")

    monkeypatch.setattr(networks, "in_a_process", killed)
    (cost,) = measure_networks(["utnetv2"], task("tiny-2d", (32, 32)), CPU)
    assert cost.problem is not None
    assert "ended by SIGKILL" in cost.problem
    assert cost.parameters is not None
    assert cost.forward_seconds is None


def test_sizes_and_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="3 positive numbers"):
        task_of(get_preset("tiny-3d"), (32, 32), 1, 4)
    with pytest.raises(InputError, match="no network 'unetr' in 2D"):
        network_names(["unetr"], 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,dice\na,0.5\n", "needs the columns"),
        ("network,dice\na,high\n", "needs the columns"),
        ("network,dice\na\n", "needs the columns"),
        ("network,dice\na,91\n", "between 0 and 1"),
        ("network,dice\n", "at least one line"),
        ("network,dice,class\na,0.9,RV\na,0.8,LV\n", "several lines for one network; .* scores.csv"),
    ],
)
def test_scores_that_are_none_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_scores(file)
    with pytest.raises(InputError, match="no such file"):
        read_scores(tmp_path / "nowhere.csv")


def test_scores_are_read_by_network(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("network,dice,folds\nutnetv2,0.91,5\nresunet,0.9,5\n")
    assert read_scores(tmp_path / "scores.csv") == {"utnetv2": 0.91, "resunet": 0.9}
