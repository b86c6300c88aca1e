"""`python -m bench.gpu` goes all its ways: on small shapes, on the CPU, with nothing timed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/ of the checkout, wherever the package is

from bench import gpu
from bench.shapes import Attention, Depthwise
from utnetv2_fast.models import PRESETS

CPU = torch.device("cpu")


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_once(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for run in runs.values():
            run()
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(gpu, "GPU", CPU)
    monkeypatch.setattr(gpu, "median_milliseconds", run_once)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(gpu, "product_speed", lambda dtype: 1e12)
    monkeypatch.setattr(gpu, "BATCHES", {"tiny-2d": 2})
    monkeypatch.setattr(gpu, "NETWORKS", ("tiny-2d",))
    monkeypatch.setattr(gpu, "ATTENTION", {"tiny-2d": [Attention(2, 40, 9, 8)]})
    monkeypatch.setattr(gpu, "DEPTHWISE", {"tiny-2d": [Depthwise(16, 8, (6, 10), (3, 3))]})
    monkeypatch.setitem(PRESETS, "tiny-2d", PRESETS["tiny-2d"]._replace(input_size=(32, 32)))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)


def test_everything_is_checked_and_written(on_the_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["operator"] for row in report["operators"]} == {
        "bidirectional_attention",
        "depthwise_conv",
        "depthwise_separable_conv",
    }
    assert len(report["networks"]) == 4
    assert all(row["problem"] is None for row in report["self_check"])
    assert "| tiny-2d n40 l9 B2 H2 d8 " in (tmp_path / "gpu.md").read_text()


def test_operators_are_measured_and_tuned_with_torch_and_triton_alone() -> None:
    pytest.importorskip("triton")
    absent = ("pydantic", "nibabel", "scipy", "surface_distance", "safetensors", "yaml", "typer", "rich", "matplotlib")
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\nimport bench.ahead_of_time, bench.gpu, bench.tune"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_wrong_result_is_not_timed_and_the_rest_is(
    on_the_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "depthwise_conv", lambda x, weight: 1.01 * torch.ones_like(x))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["operator"] for row in report["operators"]} == {"bidirectional_attention"}
    assert len(report["failures"]) == 3
    assert "depthwise_conv is wrong by" in report["failures"][0]
    assert "depthwise_conv is wrong by" in (tmp_path / "gpu.md").read_text()


def test_what_was_measured_in_time_is_kept(on_the_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--minutes", "0"])
    gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["networks"] == report["operators"] == []
    assert all("out of time" in failure for failure in report["failures"])
