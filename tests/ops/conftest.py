"""How accurate an operator must be, and which backends and builds its tests run.

A module whose tests take `impl`, `build`, `compiled` or `compiled_build` names its operator as OPERATOR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from utnetv2_fast.ops.dispatch import explain, interprets_triton
from utnetv2_fast.ops.extension import load_extension
from utnetv2_fast.ops.self_check import example

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    def check(result: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 2.0) -> None:
        """Largest error <= factor * that of `eager`, plus a few roundings of the largest exact value to the dtype.

        One rounding is all that a low-precision result costs beyond its products. In float32 the order of the sums
        decides more than that, and in float64 the yardstick has rounding errors of its own.
        """
        assert result.shape == exact.shape
        assert result.dtype == eager.dtype
        assert result.isfinite().all()
        if exact.numel() == 0:
            return
        error = (result.double() - exact).abs().max().item()
        bound = factor * (eager.double() - exact).abs().max().item()
        roundings = {torch.float32: 8, torch.float64: 100}.get(result.dtype, 1)
        bound += roundings * torch.finfo(result.dtype).eps * exact.abs().max().item()
        assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"

    return check


def skip_what_triton_lacks(impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    if impl == "triton" and dtype == torch.bfloat16 and interprets_triton():
        pytest.skip("Triton's interpreter computes bfloat16 on raw bits")


@pytest.fixture(name="skip_what_triton_lacks")
def _skip_what_triton_lacks() -> Callable[[str, torch.dtype], None]:
    """For tests of a dtype that is not their parameter `dtype`."""
    return skip_what_triton_lacks


@pytest.fixture
def skip_refused(request: pytest.FixtureRequest, device: torch.device) -> Callable[[str], str]:
    def check(impl: str) -> str:
        """`impl`, unless that backend cannot run the module's operator on the device."""
        skip_what_triton_lacks(impl, request.node.callspec.params.get("dtype", torch.float32))
        operator = request.module.OPERATOR
        refusals = explain(operator, *example(operator, device)).refusals
        if impl in refusals:
            pytest.skip(f"{impl}: {refusals[impl]}")
        return impl

    return check


@pytest.fixture(params=["reference", "cpu", "triton"])
def impl(request: pytest.FixtureRequest, skip_refused: Callable[[str], str]) -> str:
    """Every backend that runs the module's operator on `device`."""
    return skip_refused(request.param)


@contextmanager
def compiled_for(instructions: str) -> Iterator[None]:
    """The kernels use `instructions`; skips where the processor lacks them."""
    extension = load_extension()
    assert extension is not None
    if INSTRUCTION_SETS.index(instructions) > INSTRUCTION_SETS.index(extension.widest_instruction_set()):
        pytest.skip(f"this processor has no {instructions} instructions")
    before = extension.instruction_set()
    extension.use_instruction_set(instructions)
    yield
    extension.use_instruction_set(before)


@pytest.fixture(params=INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every build of the compiled kernels, for tests that call them whatever `dispatch` would choose."""
    if load_extension() is None:
        pytest.skip("the C++ extension is not built")
    with compiled_for(request.param):
        yield request.param


@pytest.fixture(params=["reference", "triton", *INSTRUCTION_SETS])
def build(request: pytest.FixtureRequest, skip_refused: Callable[[str], str]) -> Iterator[str]:
    """Every backend that runs the module's operator on `device`, and every build of the compiled one."""
    if request.param not in INSTRUCTION_SETS:
        yield skip_refused(request.param)
        return
    skip_refused("cpu")
    with compiled_for(request.param):
        yield "cpu"


@pytest.fixture(params=INSTRUCTION_SETS)
def compiled_build(request: pytest.FixtureRequest, skip_refused: Callable[[str], str]) -> Iterator[str]:
    """Every build of the compiled backend."""
    skip_refused("cpu")
    with compiled_for(request.param):
        yield "cpu"


@pytest.fixture
def compiled(skip_refused: Callable[[str], str]) -> str:
    """The backend whose results do not depend on the number of threads."""
    return skip_refused("cpu")


@pytest.fixture
def assert_same_bits_on_any_threads() -> Iterator[Callable[[Callable[[], list[Tensor]]], None]]:
    before = torch.get_num_threads()

    def check(run: Callable[[], list[Tensor]]) -> None:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))

    yield check
    torch.set_num_threads(before)
