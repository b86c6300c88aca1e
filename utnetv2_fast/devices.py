"""Which device a command computes on, and in which precision that device is at its best."""

from __future__ import annotations

import torch

from utnetv2_fast.errors import InputError

DEVICE_HELP = "auto, cpu, cuda, cuda:N or mps"


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name` (`auto`, `cpu`, `cuda`, `cuda:N`, `mps`); `auto` is a CUDA GPU, else the CPU.

    `auto` and `cuda` give the processes of one machine, numbered from 0, a GPU each as far as there are any. An Apple
    GPU is taken only by name: torch lacks some of the 3D operations there.

    Raises:
        InputError: the name is none of these, or this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is unknown: use {DEVICE_HELP}.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device {name!r} was asked for, but torch finds no CUDA GPU here: use --device cpu.")
        if device.index is None:
            return torch.device("cuda", local_rank % torch.cuda.device_count())
        if not 0 <= device.index < torch.cuda.device_count():
            raise InputError(
                f"device {name!r} was asked for, but this machine has {torch.cuda.device_count()} GPUs, from cuda:0 up."
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device {name!r} was asked for, but torch finds no Apple GPU here: use --device cpu.")
    return device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to run `torch.autocast` in on `device`, or None where float32 is the better choice.

    bfloat16 where the hardware multiplies it natively: GPUs from compute capability 8.0, and CPUs with AVX512_BF16
    (every CPU with AMX has it too), where convolutions and matrix products run up to five times as fast as in float32.
    Never float16: its range would ask for a gradient scaler.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return None
