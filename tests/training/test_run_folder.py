"""A run folder gives back what was put in, and says in a sentence what is wrong with one that is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utnetv2_fast.errors import InputError
from utnetv2_fast.models import UTNetV2
from utnetv2_fast.training import RunFolder

MakeRun = Callable[..., RunFolder]


def test_weights_come_back_exactly(make_run: MakeRun) -> None:
    run = make_run()
    model = UTNetV2(run.config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run.save_weights("last", model.state_dict())
    loaded = run.load_model()
    assert not loaded.training
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        _ = RunFolder(tmp_path / "nowhere").config
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a run folder"):
        _ = RunFolder(tmp_path / "file").config


@pytest.mark.parametrize("text", ["", "{", "protocol: clean\n", "\x00", "- 1\n"])
def test_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml: damaged"):
        _ = RunFolder(tmp_path).config


def test_unknown_setting_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    run.config_file.write_text(run.config_file.read_text() + "colour: blue\n")
    with pytest.raises(InputError, match="Extra inputs"):
        _ = run.config


def test_missing_damaged_and_foreign_weights_are_refused(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(InputError, match="no such weights"):
        run.load_model()
    run.save_weights("last", {"head.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="another network"):
        run.load_model()
    run.weights_file("last").write_bytes(b"\x10")
    with pytest.raises(InputError, match="damaged weights"):
        run.load_model()


def test_metrics_lose_a_line_cut_short_and_what_a_resumed_run_writes_again(make_run: MakeRun) -> None:
    run = make_run()
    for epoch in range(4):
        run.append_metrics({"epoch": epoch})
    with run.metrics_file.open("a") as file:
        file.write('{"epoch": 4, "lo')
    run.keep_metrics_before(3)
    assert list(run.read_metrics()) == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}]


def test_resources_keep_the_largest_peak_and_the_latest_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_resources() == {}
    run.record_resources(peak_memory_bytes=5, prediction_seconds=3.0, peak_gpu_memory_bytes=None)
    run.record_resources(peak_memory_bytes=4, prediction_seconds=2.0)
    assert run.read_resources() == {"peak_memory_bytes": 5, "prediction_seconds": 2.0}
