"""Devices are named as torch names them; a device that is not here is refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from utnetv2_fast.devices import autocast_dtype, resolve_device
from utnetv2_fast.errors import InputError


def test_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_processes_of_a_machine_get_a_gpu_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(name) == torch.device("cuda", 0)
    assert [resolve_device(name, local).index for local in range(4)] == [0, 1, 0, 1]
    assert resolve_device("cuda:1", 0) == torch.device("cuda", 1)


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "xpu", "meta", "cuda:-1"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="device"):
        resolve_device(name)


def test_an_absent_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(InputError, match="--device cpu"):
            resolve_device(name)


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(InputError, match="2 GPUs"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), None), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)])
def test_half_precision_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype(torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize(("native", "dtype"), [(False, None), (True, torch.bfloat16)])
def test_half_precision_on_a_cpu_needs_its_instructions(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert autocast_dtype(torch.device("cpu")) == dtype
