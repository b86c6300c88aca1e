"""`utnetv2-fast cost`: parameters, operations, time and memory of networks, and of the layers they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Column, Table

from utnetv2_fast.cli.console import Json, console, print_json, track
from utnetv2_fast.errors import InputError

if TYPE_CHECKING:
    import torch


def cost(
    preset: Annotated[str, typer.Option(help="Whose task the networks are built for.")] = "acdc-2d",
    model: Annotated[
        list[str] | None, typer.Option(help="A network to measure; several times.", show_default="all of the preset's")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of the input, 256x256.", show_default="the preset's")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    channels: Annotated[int | None, typer.Option(min=1, help="Of the input.", show_default="1; operators: 64")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Background included.")] = 4,
    train: Annotated[bool, typer.Option("--train", help="Measure a training step too, and its memory.")] = False,
    operators: Annotated[
        bool, typer.Option("--operators", help="Measure layers on growing maps instead: the paper's Table 8.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Operators: no step that could take longer.")] = 3.0,
    scores: Annotated[
        Path | None, typer.Option(help="CSV file, columns network and dice, for the figure.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write tables and figures to this folder.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    json: Json = False,
) -> None:
    """What networks cost on this machine: parameters, operations, time, and the most memory.

    Operations are those of a forward pass of one image, an addition and a multiplication each. Times are the shortest
    of several, of the whole batch in float32. On a CPU each is measured in a process of its own.

    With --operators: a step of convolution, full, windowed and bidirectional attention on maps of 16² to 128², and the
    power of their size by which time and memory grow.

    Examples:

    utnetv2-fast cost --preset acdc-2d --train

    utnetv2-fast cost --preset tiny-2d --model utnetv2 --size 64x64 --scores scores.csv -o cost/

    utnetv2-fast cost --operators -o cost/
    """
    from utnetv2_fast.devices import resolve_device

    if scores is not None and (out is None or operators):
        raise InputError("--scores is for the figure of networks: name its folder by --out, and leave --operators out.")
    target = resolve_device(device)
    if operators:
        if model or size is not None or train:
            raise InputError("--operators measures layers, not networks: leave --model, --size and --train out.")
        _measure_operators(target, channels or 64, batch_size, seconds, out, json=json)
        return
    from utnetv2_fast.costs.networks import as_json, measure_networks, network_names, read_scores, task_of
    from utnetv2_fast.costs.tables import network_rows
    from utnetv2_fast.models import get_preset

    dice = None if scores is None else read_scores(scores)
    chosen = get_preset(preset)
    task = task_of(chosen, None if size is None else _numbers(size), channels or 1, classes)
    names = network_names(model or [], chosen.dimensions)
    if dice is not None and not dice.keys() & set(names):
        raise InputError(f"{scores}: none of its networks is among {', '.join(names)}; correct the names.")
    costs = measure_networks(
        names, task, target, batch_size=batch_size, train=train, equal_parameters=chosen.fits_data, track=track
    )
    if out is not None:
        from utnetv2_fast.cost_report import write_networks

        write_networks(costs, out, dice)
    if json:
        print_json({"preset": preset, "size": task.patch_size, "batch_size": batch_size, "networks": as_json(costs)})
        return
    sizes = "x".join(map(str, task.patch_size))
    console.print(f"{preset}, {sizes}, batch {batch_size}, {target}:", markup=False, highlight=False)
    _print_table(network_rows(costs))


def _measure_operators(
    device: torch.device, channels: int, batch_size: int, longest: float, out: Path | None, *, json: bool
) -> None:
    from utnetv2_fast.costs.operators import HEAD_CHANNELS, as_json, measure_operators
    from utnetv2_fast.costs.tables import operator_rows

    if channels % HEAD_CHANNELS:
        raise InputError(f"--channels must be a multiple of {HEAD_CHANNELS}, the channels of a head.")
    growths = measure_operators(device, channels=channels, batch_size=batch_size, longest=longest, track=track)
    if out is not None:
        from utnetv2_fast.cost_report import write_operators

        write_operators(growths, out)
    if json:
        print_json({"channels": channels, "batch_size": batch_size, "operators": as_json(growths)})
        return
    console.print(f"d = {channels}, batch {batch_size}, {device}, forward and backward:", markup=False, highlight=False)
    _print_table(operator_rows(growths))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first of `rows` is the header, their first cells are names."""
    name, *others = (escape(cell) for cell in rows[0])
    table = Table(name, *(Column(header, justify="right") for header in others), box=SIMPLE, padding=(0, 1))
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    console.print(table)


def _numbers(size: str) -> list[int]:
    try:
        return [int(part) for part in size.lower().split("x")]
    except ValueError:
        raise InputError(f"--size {size!r} is no size; write 256x256 or 16x192x192.") from None
