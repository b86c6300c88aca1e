"""The package as installed: its public names, its version, its build, its C++ extension."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import utnetv2_fast
from utnetv2_fast.ops.extension import load_extension

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there() -> None:
    for name in utnetv2_fast.__all__:
        assert getattr(utnetv2_fast, name) is not None
    assert set(utnetv2_fast.__all__) <= set(dir(utnetv2_fast))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'unet'"):
        utnetv2_fast.unet  # noqa: B018


def test_the_installed_version_is_that_of_the_source() -> None:
    try:
        installed = importlib.metadata.version("utnetv2-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert installed == utnetv2_fast.__version__


def test_without_a_compiler_the_build_warns_once_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path / 'temp'}"],
        cwd=ROOT,
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    assert (build.stdout + build.stderr).count("installed without its C++ kernels") == 1
    assert not list(tmp_path.glob("utnetv2_fast/_C*"))


@pytest.fixture
def extension() -> ModuleType:
    module = load_extension()
    if module is None:
        pytest.skip("the C++ extension is not built")
    return module


def test_the_extension_uses_no_instruction_the_processor_lacks(extension: ModuleType) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    allowed = {"AVX512": {"avx512", "avx2", "baseline"}, "AVX2": {"avx2", "baseline"}}.get(capability, {"baseline"})
    assert extension.instruction_set() in allowed


def test_torch_governs_the_threads_of_the_extension(extension: ModuleType) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            assert extension.thread_count() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_is_loaded(extension: ModuleType) -> None:
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    assert len([name for name in libraries if any(omp in Path(name).name for omp in ("gomp", "iomp", "libomp"))]) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
@pytest.mark.usefixtures("extension")
def test_freed_memory_is_kept() -> None:
    """In a process of its own: of twenty large tensors, one after the other, few need pages of their own."""
    code = """
import resource, torch
from utnetv2_fast import keep_freed_memory
assert keep_freed_memory()
size = 64 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(size // 4)
tensors = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / size
assert tensors < 10, f"fresh pages for {tensors:.1f} of 20 tensors"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
