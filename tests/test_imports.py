"""What importing costs and needs: no torch for help, no triton, no extension and no matplotlib for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import utnetv2_fast

HEAVY = ("torch", "numpy", "scipy", "nibabel", "matplotlib", "pydantic", "jinja2", "triton", "utnetv2_fast._C")
OPTIONAL = ("matplotlib", "triton", "monai", "einops", "utnetv2_fast._C")


def run_fresh(code: str) -> None:
    """Run `code` in a new interpreter; what it raises fails the test."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("statement", ["import utnetv2_fast", "import utnetv2_fast.cli.app"])
def test_the_package_and_its_help_load_nothing_heavy(statement: str) -> None:
    run_fresh(f"{statement}\nimport sys\nfound = set({HEAVY}) & set(sys.modules)\nassert not found, found")


@pytest.mark.parametrize("module", ["ops", "models", "training", "inference"])
def test_libraries_load_nothing_optional(module: str) -> None:
    run_fresh(f"import sys, utnetv2_fast.{module}\nfound = set({OPTIONAL}) & set(sys.modules)\nassert not found, found")


def test_evaluation_needs_nothing_that_is_built_on_it() -> None:
    above = ("attention_figures", "costs", "study", "training", "inference", "inspection", "cli")
    imports = re.compile(rf"^\s*(from|import) utnetv2_fast\.({'|'.join(above)})\b", re.MULTILINE)
    for file in (Path(utnetv2_fast.__file__).parent / "evaluation").glob("*.py"):
        assert not imports.search(file.read_text("utf-8")), file.name


def test_operators_run_and_compile_without_triton_and_extension() -> None:
    """In a process whose first call of all is the compiled one."""
    run_fresh(
        """
import sys
sys.modules["triton"] = sys.modules["utnetv2_fast._C"] = None
import torch
from utnetv2_fast import bidirectional_attention

q, m = torch.randn(1, 2, 8, 4, requires_grad=True), torch.randn(1, 2, 3, 4)
out, map_out = torch.compile(bidirectional_attention, fullgraph=True, backend="aot_eager")(q, q, m, m)
out.sum().backward()
assert torch.equal(out, bidirectional_attention(q, q, m, m)[0])
"""
    )
