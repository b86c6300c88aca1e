"""The command line called in this process, and a small dataset to call it with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from utnetv2_fast.cli import app
from utnetv2_fast.data.phantom import write_phantom


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """call("verb", argument, ...) runs `utnetv2-fast verb argument ...` and returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["utnetv2-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        return int(exit_.value.code or 0)

    return run


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A folder with 4 cases of 2 patients."""
    write_phantom(tmp_path / "demo", patients=2)
    return tmp_path / "demo"
