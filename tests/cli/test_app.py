"""The command line as a user and as a script meet it: help, exit codes, one-sentence errors, JSON."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import typer

import utnetv2_fast
from utnetv2_fast.cli import app
from utnetv2_fast.errors import InputError, RunError, Stopped
from utnetv2_fast.ops import cpu, reference
from utnetv2_fast.ops.dispatch import OPERATORS
from utnetv2_fast.ops.extension import load_extension
from utnetv2_fast.ops.self_check import EXAMPLES

VERBS = [
    *("train", "predict", "evaluate", "prepare", "verify", "convert", "demo"),
    *("compare", "curve", "domains", "ablate", "cost", "attention", "info", "doctor"),
]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `utnetv2-fast ARGUMENTS` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["utnetv2-fast", *arguments])
    with pytest.raises(SystemExit) as exit_:
        app.main()
    return int(exit_.value.code or 0)


def replace_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the command line consist of one verb, `work [--json]`, that raises `error`."""

    def work(json: bool = False) -> None:
        raise error

    single = typer.Typer(pretty_exceptions_enable=False)
    single.command()(work)
    single.callback()(lambda: None)
    monkeypatch.setattr(app, "app", single)


def test_help_lists_the_verbs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    positions = [text.index(f" {verb} ") for verb in VERBS]
    assert positions == sorted(positions)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, verb, "--help") == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"utnetv2-fast {verb}" in text.replace("Usage: utnetv2-fast", "")


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{utnetv2_fast.__version__}\n"


@pytest.mark.parametrize("arguments", [["segment"], ["info", "--colour"], ["predict"]])
def test_wrong_usage_exits_with_2(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, *arguments) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a.nii.gz is truncated; download it again."), 2),
        (RunError("the loss is not finite."), 1),
        (PermissionError(13, "Permission denied", "/runs"), 1),
    ],
)
def test_a_users_error_is_one_sentence(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_verb(monkeypatch, error)
    assert call(monkeypatch, "work") == code
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""
    assert call(monkeypatch, "work", "--json") == code
    assert json.loads(capsys.readouterr().out) == {"error": str(error), "exit_code": code}


def test_work_that_was_stopped_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_verb(monkeypatch, Stopped("Stopped after step 3.", "`utnetv2-fast work`"))
    message = "Stopped after step 3. Go on with `utnetv2-fast work`."
    assert call(monkeypatch, "work") == 0
    assert capsys.readouterr() == ("", f"{message}\n")
    assert call(monkeypatch, "work", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"stopped": message, "exit_code": 0}


def test_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_verb(monkeypatch, KeyboardInterrupt())
    assert call(monkeypatch, "work") == 130


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(2, "No such file or directory", "x")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_verb(monkeypatch, error)
    monkeypatch.setattr(sys, "argv", ["utnetv2-fast", "work"])
    with pytest.raises(type(error)):
        app.main()


def test_an_error_of_a_real_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "verify", "no/such/folder") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no/such/folder")
    assert captured.err.count("\n") == 1


def test_info_names_versions_presets_and_networks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "info", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["versions"]["utnetv2-fast"] == utnetv2_fast.__version__
    assert 0 < content["presets"]["tiny-2d"]["parameters"] < content["presets"]["acdc-2d"]["parameters"]
    assert content["networks"]["attention-unet"] == {"title": "Attention UNet", "dimensions": [2]}
    assert content["networks"]["utnetv2"]["dimensions"] == [2, 3]
    assert call(monkeypatch, "info") == 0
    printed = capsys.readouterr().out
    assert "tiny-2d" in printed
    assert "Attn ResUNet" in printed


def test_doctor_checks_the_operators(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "doctor", "--quick", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["machine"]["threads"] >= 1
    assert {row["operator"] for row in content["operators"]} == {operator.__name__ for operator in EXAMPLES}
    assert {row["operator"] for row in content["operators"]} <= set(OPERATORS)
    if (extension := load_extension()) is not None:
        used, widest = extension.instruction_set(), extension.widest_instruction_set()
        assert content["machine"]["cpp_extension"].startswith(f"{used} instructions, the widest here;")
        assert used == widest
    assert all(row["right"] and row["backend"] not in row["refusals"] for row in content["operators"])
    assert call(monkeypatch, "doctor", "--quick") == 0


def test_doctor_fails_when_an_operator_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Only in low precision: the float64 it is compared with stays right.
    correct = reference.depthwise_conv
    for backend in (reference, cpu):
        monkeypatch.setattr(
            backend, "depthwise_conv", lambda x, *rest: correct(x, *rest) * (1.01 if x.dtype != torch.float64 else 1)
        )
    assert call(monkeypatch, "doctor", "--quick") == 1
    assert "WRONG" in capsys.readouterr().out


def test_doctor_reports_an_operator_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    correct = reference.scale_shift

    def fail_in_low_precision(x: torch.Tensor, *rest: object) -> torch.Tensor:
        if x.dtype != torch.float64:
            raise RuntimeError("no kernel image [sm_75]\nis available")
        return correct(x, *rest)

    for backend in (reference, cpu):
        monkeypatch.setattr(backend, "scale_shift", fail_in_low_precision)
    assert call(monkeypatch, "doctor", "--quick", "--json") == 1
    wrong = [row for row in json.loads(capsys.readouterr().out)["operators"] if not row["right"]]
    assert {row["operator"] for row in wrong} == {"scale_shift"}
    assert all(row["relative_error"] is None for row in wrong)
    assert {row["problem"] for row in wrong} == {"RuntimeError: no kernel image [sm_75]"}
    assert call(monkeypatch, "doctor", "--quick") == 1
    assert "[sm_75]" in capsys.readouterr().out
