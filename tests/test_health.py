"""What doctor tells of a machine: known problems by version, and times of what runs here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch

from utnetv2_fast import health
from utnetv2_fast.cli import app
from utnetv2_fast.ops.self_check import EXAMPLES


@pytest.mark.parametrize(
    ("torch_version", "triton", "cuda", "extension", "said"),
    [
        ("2.9.1+cu130", "3.5.0", True, True, ["torch 2.9 runs 3D convolutions"]),
        ("2.9.1+cpu", None, False, True, []),
        ("2.13.0a0+git1234", "3.6.0", True, False, []),
        ("2.13.0", None, True, True, ["triton is not installed"]),
        ("2.13.0+cpu", None, False, False, ["The C++ extension is not built"]),
    ],
)
def test_known_problems_are_those_of_the_versions(
    torch_version: str, triton: str | None, cuda: bool, extension: bool, said: list[str]
) -> None:
    problems = health.known_problems(torch_version, triton, cuda=cuda, extension=extension)
    assert len(problems) == len(said)
    assert all(problem.startswith(start) for problem, start in zip(problems, said, strict=True))


def test_the_machine_has_room() -> None:
    facts = health.machine()
    assert facts["torch"] == torch.__version__
    assert float(facts["free_disk_here_gib"]) > 0
    if sys.platform == "linux":
        assert 0 < float(facts["free_memory_gib"]) <= float(facts["memory_gib"])


def test_doctor_times_every_operator_in_both_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(min(n, 8) if n != 3 else 3 for n in shape) for shape in shapes)

    timed: dict[Callable[..., object], tuple[tuple[int, ...], ...]] = health._TIMED
    monkeypatch.setattr(health, "_TIMED", {operator: small(shapes) for operator, shapes in timed.items()})
    for arguments in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["utnetv2-fast", "doctor", *arguments])
        with pytest.raises(SystemExit) as left:
            app.main()
        assert not left.value.code
    printed = capsys.readouterr().out
    content, _ = json.JSONDecoder().raw_decode(printed)
    assert {row["operator"] for row in content["speeds"]} == {operator.__name__ for operator in EXAMPLES}
    assert all(row["milliseconds"] > 0 and row["reference_milliseconds"] > 0 for row in content["speeds"])
    assert all(row["gflops"] > 0 for row in content["dense_convolution"])
    assert "x as long" in printed
    assert "GFLOP/s" in printed
