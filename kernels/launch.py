"""What every launcher of a kernel needs: the right GPU, its size, and block sizes that were tuned for it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of_tensors(launcher: Callable[P, R]) -> Callable[P, R]:
    """Launch on the GPU of the first argument, a tensor; Triton itself would take the current one."""

    @functools.wraps(launcher)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launcher(*args, **kwargs)

    return run


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, at least; a few for the interpreter, so that it splits work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def tuned(kernel: str, device: torch.device, key: str, by_rule: dict[str, int]) -> dict[str, int]:
    """The block sizes, warps and stages of `kernel`: those that `python -m bench.tune` found on such a GPU, if any."""
    return _table(architecture(device)).get(kernel, {}).get(key, by_rule)


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90 and the like, gfx942 and the like; "interpreter" where there is no GPU."""
    if device.type != "cuda":
        return "interpreter"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _table(name: str) -> dict[str, dict[str, dict[str, int]]]:
    file = resources.files("utnetv2_fast.kernels") / "tables" / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}
