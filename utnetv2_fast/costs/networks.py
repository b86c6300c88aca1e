"""Parameters, operations, time and memory of the networks that can be trained on one task (paper, Fig. 2 B and C)."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import utnetv2_fast.ops.flops  # noqa: F401 (so that our operators are counted)
from utnetv2_fast.costs.measure import PeakMemory, in_a_process, shortest
from utnetv2_fast.errors import InputError, RunError
from utnetv2_fast.files import read_bounded
from utnetv2_fast.models import (
    NETWORKS,
    AnyNetworkConfig,
    Preset,
    Task,
    build_network,
    configure_network,
    find_network,
)
from utnetv2_fast.progress import Track, silent
from utnetv2_fast.training.losses import supervised_loss

_CONFIG: TypeAdapter[AnyNetworkConfig] = TypeAdapter(AnyNetworkConfig)
_LARGEST_SCORES = 2**20  # bytes


@dataclass(frozen=True)
class NetworkCost:
    """Of one network at one input size; None is what was not measured, or cannot be here.

    problem          why it was not measured, else None
    parameters       numbers that are trained
    flops            operations of a forward pass of one image, an addition and a multiplication each
    forward_seconds  of a batch, without gradients
    step_seconds     of a training step on a batch: forward, loss, backward, AdamW
    peak_bytes       memory of that step beside the network, without it of the forward pass
    """

    network: str
    title: str
    problem: str | None = None
    parameters: int | None = None
    flops: int | None = None
    forward_seconds: float | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None


def task_of(preset: Preset, size: Sequence[int] | None, in_channels: int, num_classes: int) -> Task:
    """The task of a preset's own input size, or another.

    Raises InputError when the size has not the preset's dimensions.
    """
    if size is not None and (len(size) != preset.dimensions or min(size) < 1):
        raise InputError(f"--size needs {preset.dimensions} positive numbers for this preset, such as 64x64.")
    return preset.task(in_channels, num_classes, size)


def network_names(names: Sequence[str], dimensions: int) -> list[str]:
    """`names`, or every network there is in 2D or 3D where there are none; InputError for one that there is not."""
    for name in names:
        find_network(name, dimensions)
    return list(names) or [name for name, choice in NETWORKS.items() if dimensions in choice.dimensions]


def measure_networks(
    names: Sequence[str],
    task: Task,
    device: torch.device,
    *,
    batch_size: int = 1,
    train: bool = False,
    equal_parameters: bool = False,
    track: Track = silent,
) -> list[NetworkCost]:
    """The cost of every network for `task`; of one that cannot be built, why."""
    return [
        _measure(name, task, device, batch_size, train, equal_parameters) for name in track(list(names), "Measuring")
    ]


def _measure(
    name: str, task: Task, device: torch.device, batch_size: int, train: bool, equal_parameters: bool
) -> NetworkCost:
    title = NETWORKS[name].title
    try:
        config = configure_network(name, task, equal_parameters=equal_parameters)
        parameters, flops = count(config, task.patch_size)
    except InputError as problem:
        return NetworkCost(name, title, problem=str(problem))
    arguments = (config.model_dump_json(), task.patch_size, batch_size, train, str(device))
    # A process's largest size never falls, so that each network needs one of its own; a GPU can be asked anew.
    try:
        if device.type == "cpu":
            measured = in_a_process("utnetv2_fast.costs.networks", "time_and_peak", *arguments, torch.get_num_threads())
        else:
            measured = time_and_peak(*arguments)
    except RunError as problem:
        return NetworkCost(name, title, str(problem), parameters, flops)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        reason = "the memory of the GPU does not suffice; a smaller batch or size takes less"
        return NetworkCost(name, title, reason, parameters, flops)
    return NetworkCost(name, title, None, parameters, flops, **measured)


def count(config: AnyNetworkConfig, size: Sequence[int]) -> tuple[int, int]:
    """(parameters, operations of a forward pass of one image); no memory is taken and nothing computed."""
    # torch counts no operations of its fused attention on a CPU, but the products of the plain one.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network = build_network(config).eval()
        x = torch.randn(1, config.in_channels, *size)
        with FlopCounterMode(display=False) as counter:
            network(x)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def time_and_peak(
    config: str, size: Sequence[int], batch_size: int, train: bool, device: str, threads: int | None = None
) -> dict[str, float | None]:
    """The measured fields of `NetworkCost`; `config` is JSON. On a CPU for a fresh process."""
    if threads is not None:
        torch.set_num_threads(threads)
    target = torch.device(device)
    settings = _CONFIG.validate_json(config)
    network = build_network(settings).to(target)
    image = torch.randn(batch_size, settings.in_channels, *size, device=target)
    label = torch.randint(settings.num_classes, (batch_size, *size), device=target)
    optimizer = torch.optim.AdamW(network.parameters())
    class_weights = torch.ones(settings.num_classes, device=target)

    def forward() -> None:
        with torch.no_grad():
            network(image)

    def step() -> None:
        supervised_loss(network(image), label, class_weights, 0.5).backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = PeakMemory(target)
    network.eval()
    measured: dict[str, float | None] = {"forward_seconds": shortest(forward, target)}
    if train:
        network.train()
        measured["step_seconds"] = shortest(step, target)
    return measured | {"peak_bytes": peak.taken()}


def as_json(costs: Sequence[NetworkCost]) -> list[dict[str, Any]]:
    return [asdict(cost) for cost in costs]


def read_scores(file: Path) -> dict[str, float]:
    """{network: Dice} of a CSV file with these columns.

    Raises InputError when it is not there, lacks a column, names a network twice, or holds something else than numbers
    from 0 to 1.
    """
    try:
        lines = read_bounded(file, _LARGEST_SCORES).decode("utf-8-sig").splitlines()
        rows = [(row["network"], float(row["dice"])) for row in csv.DictReader(lines, strict=True)]
    except OSError:
        raise InputError(f"{file}: no such file; name a CSV file with the columns network and dice.") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError(f"{file}: needs the columns network and dice, a name and a number in each line.") from None
    scores = dict(rows)
    if len(scores) < len(rows):
        raise InputError(
            f"{file}: has several lines for one network; give one for each, as the scores.csv of a study has."
        )
    if not scores or not all(0 <= dice <= 1 and math.isfinite(dice) for dice in scores.values()):
        raise InputError(f"{file}: Dice must lie between 0 and 1; give at least one line.")
    return scores
