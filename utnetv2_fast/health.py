"""What this machine offers and what is known to go wrong on it: the versions, the room, the speed of its operators."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from utnetv2_fast.ops import (
    bidirectional_attention,
    channel_moments,
    depthwise_conv,
    depthwise_separable_conv,
    scale_shift,
)
from utnetv2_fast.ops.dispatch import Impl, explain
from utnetv2_fast.ops.extension import load_extension

GIB = 2**30


def machine() -> dict[str, str | int | float]:
    """Names and values to show: system, versions, instruction set, GPUs, memory and disk in GiB."""
    extension = load_extension()
    facts: dict[str, str | int | float] = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "triton": version_of("triton") or "not installed",
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }
    if extension is None:
        facts["cpp_extension"] = "not built: install a C++17 compiler, then install utnetv2-fast again"
    else:
        used, widest = extension.instruction_set(), extension.widest_instruction_set()
        note = "the widest here" if used == widest else f"although {widest} is here"
        facts["cpp_extension"] = f"{used} instructions, {note}; {extension.thread_count()} threads"
    if torch.version.cuda is not None:
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = str(torch.backends.cudnn.version())
    facts |= {f"gpu_{i}": _describe_gpu(i) for i in range(torch.cuda.device_count())} or {"gpu": "none"}
    for name, unit in (("memory_gib", "SC_PHYS_PAGES"), ("free_memory_gib", "SC_AVPHYS_PAGES")):
        if (pages := _system_value(unit)) is not None:
            facts[name] = round(pages * (_system_value("SC_PAGE_SIZE") or 0) / GIB, 1)
    facts["free_disk_here_gib"] = round(shutil.disk_usage(Path.cwd()).free / GIB, 1)
    return facts


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    kind = f"{properties.name}, sm_{properties.major}{properties.minor}"
    return f"{kind}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"


def version_of(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _system_value(name: str) -> int | None:
    """Of sysconf; None where the system does not tell."""
    try:
        return os.sysconf(name)
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, others may lack these names
        return None


def known_problems(torch_version: str, triton_version: str | None, *, cuda: bool, extension: bool) -> list[str]:
    """A sentence for each thing that others have met with these versions, and for what is missing."""
    release = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    problems = []
    if cuda and release == (2, 9):
        problems.append(
            "torch 2.9 runs 3D convolutions in bfloat16 about four times as slow as 2.8 and with three times the "
            "memory (pytorch issues 166122 and 166643); install another version."
        )
    if cuda and triton_version is None:
        problems.append("triton is not installed: plain PyTorch will run on the GPU; pip install triton.")
    if not cuda and not extension:
        problems.append("The C++ extension is not built: plain PyTorch will run on the CPU.")
    return problems


@dataclass(frozen=True)
class Speed:
    """Milliseconds of forward and backward of an operator as it runs here and as plain PyTorch runs it."""

    operator: str
    shape: tuple[int, ...]
    device: str
    dtype: str
    backend: str
    milliseconds: float
    reference_milliseconds: float


# Shapes of ACDC in 3D at the second and the third level.
_TIMED: dict[Callable[..., object], tuple[tuple[int, ...], ...]] = {
    bidirectional_attention: ((1, 4, 36864, 32), (1, 4, 36864, 32), (1, 4, 27, 32), (1, 4, 27, 32)),
    channel_moments: ((1, 128, 16, 48, 48),),
    depthwise_conv: ((1, 128, 16, 48, 48), (128, 1, 3, 3, 3)),
    depthwise_separable_conv: ((1, 128, 16, 48, 48), (128, 1, 3, 3, 3), (128, 128, 1, 1, 1)),
    scale_shift: ((1, 128, 16, 48, 48), (1, 128), (1, 128)),
}


def speeds(device: torch.device, dtype: torch.dtype) -> Iterator[Speed]:
    """Of every operator at one shape of the 3D network, each measured for a fifth of a second and more."""
    for operator, shapes in _TIMED.items():
        inputs = tuple(
            torch.randn(shape, device=device, dtype=dtype if len(shape) > 2 else torch.float32) for shape in shapes
        )
        if inputs[0].ndim == 5:
            inputs = (inputs[0].to(memory_format=torch.channels_last_3d), *inputs[1:])
        yield Speed(
            operator=operator.__name__,
            shape=shapes[0],
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            backend=explain(operator, *inputs).backend,
            milliseconds=_milliseconds(operator, inputs, "auto"),
            reference_milliseconds=_milliseconds(operator, inputs, "reference"),
        )


def dense_conv_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of forward and backward of torch's dense convolution in 3D, which takes most of a training's time."""
    x = torch.randn(1, 64, 16, 96, 96, device=device, dtype=dtype).to(memory_format=torch.channels_last_3d)
    weight = torch.randn(64, 64, 3, 3, 3, device=device, dtype=dtype)

    def convolve(x: Tensor, weight: Tensor, impl: Impl) -> Tensor:
        return F.conv3d(x, weight, padding=1)

    operations = 3 * 2 * x.numel() * weight[0].numel()
    return operations / (1e-3 * _milliseconds(convolve, (x, weight), "auto"))


def _milliseconds(operator: Callable[..., object], inputs: tuple[Tensor, ...], impl: Impl) -> float:
    """The shortest time of forward and backward within a fifth of a second, and of two runs at least."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)

    def run() -> float:
        started = time.perf_counter()
        returned = operator(*leaves, impl=impl)
        results = returned if isinstance(returned, tuple) else (returned,)
        torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
        if leaves[0].is_cuda:
            torch.cuda.synchronize(leaves[0].device)
        return 1e3 * (time.perf_counter() - started)

    run()
    started, taken = time.perf_counter(), [run()]
    while time.perf_counter() - started < 0.2 or len(taken) < 2:
        taken.append(run())
    return min(taken)
