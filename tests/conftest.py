"""What every test gets: fixed seeds, uninitialised memory that shows, the real scans and GPUs where there are any."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

# Before torch counts the cores. Its threads gain little on small tensors, and wait for each other at full speed where
# tests run in several processes; the tests that are about threads say how many they want.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from utnetv2_fast.ops import explain
from utnetv2_fast.ops.self_check import EXAMPLES, example

if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _multiply_float32_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in TF32, which cuDNN takes for convolutions of float32 otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin give NaN to the package, so that an element nobody wrote shows in a result."""

    def poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = create(*args, **kwargs)
            if torch.compiler.is_compiling():
                return result
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("utnetv2_fast") and result.is_floating_point() and not result.requires_grad:
                result.fill_(float("nan"))
            return result

        return run

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _interpret_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter puts its own functions into the language at every call of a helper; once a launch is enough.

    That is where four fifths of its time go.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if not hasattr(interpreter, "_patch_lang"):
        return
    patch = interpreter._patch_lang
    patched: dict[bool, Any] = {}

    class Scope:
        def __init__(self, fn: Any) -> None:
            self._scope = patch(fn)

        def restore(self) -> None:
            patched.clear()
            self._scope.restore()

    def patch_once(fn: Any) -> Any:
        language = "tl" in fn.__globals__  # else it is of the standard library, which calls the same modules otherwise
        if language not in patched:
            patched[language] = Scope(fn)
        return patched[language]

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU where there is one: `pytest -m gpu` runs those cases alone."""
    return torch.device(request.param)


@pytest.fixture
def on_triton(device: torch.device) -> torch.device:
    """`device`, if every operator of the network runs there by Triton."""
    for operator in EXAMPLES:
        refusals = explain(operator, *example(operator, device)).refusals
        if "triton" in refusals:
            pytest.skip(f"{operator.__name__}: {refusals['triton']}")
    return device


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $UTNETV2_FAST_DATA, or shared/data beside the checkout; skips without it."""
    folder = Path(os.environ.get("UTNETV2_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real scans are not here: {folder} (set UTNETV2_FAST_DATA)")
    return folder


@pytest.fixture(scope="session")
def short_axis_affines() -> list[NDArray[np.float64]]:
    """Affines (4, 4) of three scans (i, j, k) of a heart that lies otherwise in each: 9 mm between slices, 1.4 in them.

    Its long axis leads to the left, the front and below, nearest to X in the first scan, to Y in the second, to Z in
    the third.
    """
    scan = np.array([[2, 3, -6], [-3, 6, 2], [-6, -2, -3]]) / 7
    turn = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    affines = []
    for _ in range(3):
        affine = np.eye(4)
        affine[:3, :3] = scan * (1.4, 1.4, 9.0)
        affines.append(affine)
        scan = turn @ scan
    return affines
