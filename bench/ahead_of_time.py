"""Compiles the Triton kernels for GPUs that are not here, exactly as their launchers would ask for them.

`python -m bench.ahead_of_time` compares registers, spills and shared memory with the committed ledger
(bench/results/triton_resources.json) and fails where they differ, where a kernel spills or asks for more shared memory
than the chip has, or where it computes in float64; `--update` writes the ledger. All calls of bench/calls.py are
compiled for sm_90, for the other chips the attention and the main ones of the rest. Needs Triton and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.calls import calls

LEDGER = Path(__file__).parent / "results" / "triton_resources.json"
KIB = 1024
SPILLED = 24  # bytes that pass: some calls take a few, with all registers in use or with many left
META = torch.device("meta")


@dataclass(frozen=True)
class Chip:
    """A GPU to compile for; the shared memory that one program may have, and its multiprocessors."""

    name: str
    target: GPUTarget
    shared_bytes: int
    multiprocessors: int


CHIPS = (
    Chip("sm_80", GPUTarget("cuda", 80, 32), 163 * KIB, 108),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * KIB, 132),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * KIB, 148),
    Chip("sm_120", GPUTarget("cuda", 120, 32), 99 * KIB, 170),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KIB, 304),
)


class _AbsentGPU:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recorded_for(chip: Chip) -> Iterator[list[tuple[str, Any]]]:
    """Launches compile for `chip` instead of running; the list receives (kernel, what Triton compiled)."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        self.device_caches.clear()
        result = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, result))
        return result

    replaced = {"multiprocessors": lambda device: chip.multiprocessors, "architecture": lambda device: chip.name}
    modules = [module for name, module in sys.modules.items() if name.startswith("utnetv2_fast.kernels.")]
    originals = [
        (module, name, getattr(module, name)) for module in modules for name in replaced if hasattr(module, name)
    ]
    driver.set_active(_AbsentGPU(chip.target))
    JITFunction.run = record
    for module, name, _ in originals:
        setattr(module, name, replaced[name])
    try:
        yield compiled
    finally:
        JITFunction.run = run
        for module, name, original in originals:
            setattr(module, name, original)


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes that they spill, and bytes of shared memory and warps of a program."""
    if "cubin" in compiled.asm:
        registers, spilled = _of_cubin(compiled.asm["cubin"])
    else:
        registers, spilled = _of_amdgcn(compiled.asm["amdgcn"])
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout + shown.stderr)
    assert match is not None, "cuobjdump says nothing of registers"
    return int(match[1]), int(match[2])


def _of_amdgcn(assembly: str) -> tuple[int, int]:
    counts = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    return counts["vgpr_count"], 4 * counts["vgpr_spill_count"]


def compile_for(chip_name: str, main_only: bool) -> dict[str, dict[str, dict[str, int]]]:
    """call -> kernel -> its resources on the chip.

    Raises:
        AssertionError: a kernel computes in float64.
    """
    chip = next(chip for chip in CHIPS if chip.name == chip_name)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for call in calls(META):
        everywhere = not main_only and (chip.name == "sm_90" or "attention" in call.name)
        if not call.main and not everywhere:
            continue
        with recorded_for(chip) as compiled:
            call.prepare()()
        assert compiled, f"{call.name}: no kernel was launched"
        for kernel, result in compiled:
            assert "f64" not in result.asm.get("ptx", ""), f"{call.name} on {chip.name}: {kernel} computes in float64"
            of_call = found.setdefault(call.name, {})
            name = kernel.strip("_")
            of_call[name if name not in of_call else f"{name}, {len(of_call) + 1}th launch"] = resources(result)
    return found


Ledger = dict[str, dict[str, dict[str, dict[str, int]]]]  # chip -> call -> kernel -> resources


def compile_all(chips: Sequence[str], main_only: bool) -> Ledger:
    """Of every chip, side by side."""
    with ProcessPoolExecutor(min(len(chips), os.cpu_count() or 1), get_context("spawn")) as pool:
        return dict(zip(chips, pool.map(compile_for, chips, [main_only] * len(chips)), strict=True))


def complaints(found: Ledger, expected: Ledger) -> list[str]:
    """What is wrong with `found`, and where it differs from the ledger."""
    said = []
    for chip in CHIPS:
        for call, by_kernel in found.get(chip.name, {}).items():
            for kernel, used in by_kernel.items():
                where = f"{chip.name}: {kernel} of {call}"
                if used["spilled"] > SPILLED:
                    said.append(f"{where} spills {used['spilled']} bytes")
                if used["shared"] > chip.shared_bytes:
                    said.append(f"{where} asks for {used['shared']} bytes of shared memory of {chip.shared_bytes}")
                recorded = expected.get(chip.name, {}).get(call, {}).get(kernel)
                if recorded != used:
                    said.append(f"{where}: {used}, and the ledger says {recorded}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the ledger instead of comparing with it")
    parser.add_argument("--main", action="store_true", help="the main calls alone, as the tests do")
    parser.add_argument("--chip", nargs="+", choices=[chip.name for chip in CHIPS], help="these chips alone")
    options = parser.parse_args()
    if options.update and (options.main or options.chip):
        parser.error("--update compiles everything; leave out --main and --chip")
    found = compile_all(options.chip or [chip.name for chip in CHIPS], options.main)
    if options.update:
        versions = {"triton": triton.__version__}
        LEDGER.write_text(json.dumps({"versions": versions, "chips": found}, indent=1) + "\n")
        expected = found
    else:
        ledger = json.loads(LEDGER.read_text())
        expected = ledger["chips"]
        if ledger["versions"]["triton"] != triton.__version__:
            print(f"note: the ledger is of Triton {ledger['versions']['triton']}, this is {triton.__version__}")
    said = complaints(found, expected)
    print("\n".join(said) or f"{sum(map(len, found.values()))} calls as in the ledger")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
