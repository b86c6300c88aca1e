"""`utnetv2-fast info`: versions, presets and networks."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.box import SIMPLE
from rich.table import Column, Table

import utnetv2_fast
from utnetv2_fast.cli.console import Json, console, print_json

PACKAGES = ("torch", "triton", "numpy", "scipy", "nibabel", "surface-distance", "safetensors", "pydantic")


def info(json: Json = False) -> None:
    """Versions of what this installation runs on, and the networks it knows.

    Examples:

    utnetv2-fast info

    utnetv2-fast info --json
    """
    versions = {"utnetv2-fast": utnetv2_fast.__version__, "python": platform.python_version()}
    versions |= {package: _version(package) for package in PACKAGES}
    presets = {name: _describe(name) for name in _preset_names()}
    networks = _networks()
    if json:
        print_json({"versions": versions, "presets": presets, "networks": networks})
        return
    console.print(", ".join(f"{package} {number}" for package, number in versions.items()), highlight=False)
    table = _table("preset", "input", "blocks", "heads", "map", "norm", "params")
    for name, preset in presets.items():
        sizes = ["x".join(map(str, preset[key])) for key in ("input_size", "map_size")]
        counts = [",".join(map(str, preset[key])) for key in ("blocks", "heads")]
        table.add_row(name, sizes[0], *counts, sizes[1], preset["norm"], f"{preset['parameters'] / 1e6:.2f} M")
    console.print(table)
    table = _table("--model", "network", "in")
    for name, network in networks.items():
        table.add_row(name, network["title"], ", ".join(f"{dimensions}D" for dimensions in network["dimensions"]))
    console.print(table)


def _table(*headers: str) -> Table:
    return Table(*(Column(header, no_wrap=True) for header in headers), box=SIMPLE, padding=0)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _preset_names() -> list[str]:
    from utnetv2_fast.models import PRESETS

    return list(PRESETS)


def _describe(name: str) -> dict[str, Any]:
    """The preset's fields, and its parameters for one channel and four classes."""
    import torch

    from utnetv2_fast.models import UTNetV2, get_preset

    with torch.device("meta"):
        model = UTNetV2.from_preset(name, in_channels=1, num_classes=4)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    preset = get_preset(name)
    return {"input_size": preset.input_size, **preset.fields, "parameters": parameters}


def _networks() -> dict[str, dict[str, Any]]:
    """The title of every network, and the dimensions in which it exists; `cost` builds and counts them."""
    from utnetv2_fast.models import NETWORKS

    return {name: {"title": choice.title, "dimensions": choice.dimensions} for name, choice in NETWORKS.items()}
