"""`pytest --benchmark` runs the benchmarks of bench/; plain `pytest` never does."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks of bench/ instead of the tests")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = [str(config.rootpath / "bench")]
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # bench/conftest.py prints tables with the roof and the peers instead
