"""Trains runs in processes that are killed: python killed_training.py TEMPLATE CASES OUT KIND [SEED].

TEMPLATE is a configured run, CASES a folder with case0 to case2, of which the last is held out. OUT/whole becomes the
run that was never stopped. KIND
  times   OUT/0 to OUT/19 are killed at a random instant, and then trained to their end;
  writes  OUT/0, OUT/1, ... are killed before the first file takes its name, after it, before the second, ...

The processes are forked from this one, which has imported everything and computed nothing: their start costs little.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.models import UTNetV2Config
from utnetv2_fast.training import RunFolder, state, train

KILLED_RUNS = 20


class SmallNetwork(nn.Sequential):
    """Takes a hundredth of UTNetV2's time, and has all that must be restored: weights, statistics of a batch norm, and
    steps that depend on the global generator.
    """

    def __init__(self, config: UTNetV2Config) -> None:
        conv = nn.Conv2d(config.in_channels, 8, 3, padding=1)
        super().__init__(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, config.num_classes, 1))


def start(run: Path, cases: list[PreparedCase], prepare: Callable[[], None] = lambda: None) -> int:
    """Begin or go on with a training in a process of its own; its id."""
    if child := os.fork():
        return child
    try:
        prepare()
        state.build_network = SmallNetwork  # type: ignore[assignment]
        train(RunFolder(run), cases[:2], cases[2:], torch.device("cpu"))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def was_killed(child: int) -> bool:
    """Wait for its end; SystemExit when it failed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"a training failed with {code}")
    return code != 0


def kill_after(seconds: float, run: Path, cases: list[PreparedCase]) -> bool:
    """Begin a training and kill it; False when it ended before."""
    child = start(run, cases)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return was_killed(child)


def kill_at_write(instant: int) -> None:
    """Let this process die at a write: `instant` counts the moments before and after each file takes its name."""
    replace, instants = os.replace, itertools.count()

    def die_at_instant() -> None:
        if next(instants) == instant:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly_replace(*names: object) -> None:
        die_at_instant()
        replace(*names)  # type: ignore[arg-type]
        die_at_instant()

    os.replace = deadly_replace  # type: ignore[assignment]


def main(template: Path, out: Path, cases: list[PreparedCase], kind: str, seed: int) -> None:
    def new_run(name: str) -> Path:
        return Path(shutil.copytree(template, out / name))

    began = time.monotonic()
    was_killed(start(new_run("whole"), cases))
    duration = time.monotonic() - began
    if kind == "times":
        random.seed(seed)
        for number in range(KILLED_RUNS):
            run = new_run(str(number))
            while not kill_after(random.uniform(0, duration), run, cases):  # it had come to its end
                duration *= 0.8  # the machine was slower when that was measured
                shutil.rmtree(run)
                new_run(str(number))
            was_killed(start(run, cases))
        return
    for instant in itertools.count():
        run = new_run(str(instant))
        if not was_killed(start(run, cases, lambda: kill_at_write(instant))):  # noqa: B023 (called at once)
            shutil.rmtree(run)
            return
        was_killed(start(run, cases))


if __name__ == "__main__":
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which the first optimiser imports
    folder = Path(sys.argv[2])
    parts = ("image", "label", "foreground")
    prepared = [
        PreparedCase(f"case{i}", f"patient{i}", *(folder / f"case{i}.{part}.npy" for part in parts)) for i in range(3)
    ]
    main(Path(sys.argv[1]), Path(sys.argv[3]), prepared, sys.argv[4], int(sys.argv[5]))
