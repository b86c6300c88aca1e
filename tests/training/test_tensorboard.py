"""TensorBoard gets every epoch once, however often the run is started, and is asked for by a sentence when missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from utnetv2_fast.errors import InputError
from utnetv2_fast.training import tensorboard
from utnetv2_fast.training.tensorboard import require_tensorboard, tensorboard_log

RECORDS: list[dict[str, Any]] = [
    {"epoch": e, "loss": 1.0 / (e + 1), "learning_rate": 0.1, "dice": 0.5, "dice_per_class": [0.25 * e, None]}
    for e in range(3)
]
EXPECTED = {
    "loss": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))],
    "learning rate": [(e, pytest.approx(0.1)) for e in (1, 2, 3)],
    "Dice/mean": [(e, 0.5) for e in (1, 2, 3)],
    "Dice/LV": [(1, 0.0), (2, 0.25), (3, 0.5)],
}


class Writer:
    """Records what torch's writer would be told."""

    def __init__(self, folder: str, purge_step: int) -> None:
        assert purge_step == 0
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.flushed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append((step, value))

    def flush(self) -> None:
        self.flushed += 1


def test_every_epoch_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writers: list[Writer] = []

    def make(folder: str, purge_step: int) -> Writer:
        writers.append(Writer(folder, purge_step))
        return writers[-1]

    monkeypatch.setattr(tensorboard, "require_tensorboard", lambda: make)
    log = tensorboard_log(tmp_path, ("LV", "RV"))
    for epochs in (2, 2, 3):  # a resumed run begins with several
        log(RECORDS[:epochs])
    assert writers[0].scalars == EXPECTED
    assert writers[0].flushed == 3


def test_the_event_files_hold_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in (2, 3):  # started twice
        tensorboard_log(tmp_path, ("LV", "RV"))(RECORDS[:epochs])
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == EXPECTED


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'utnetv2-fast\[tensorboard\]'"):
        require_tensorboard()
