"""Trains runs in one process and in two that train together: python parallel_training.py TEMPLATE CASES OUT KIND.

TEMPLATE is a configured run, CASES a folder with case0 to case2, of which the last is held out. KIND
  equal      OUT/one is trained by one process, OUT/two by two, both in float64;
  gradients  OUT/one.pt and OUT/two.pt hold the gradients that one process and two find for one batch, in float64;
  ends       OUT/whole is never interrupted; in OUT/killed and OUT/stopped the second of two processes is killed after
             the third step, or asked to stop there; then each is copied and goes on in two processes (.., -two) and in
             one (.., -one). OUT/killed.txt holds what the surviving process said.

The processes are forked from this one, which has imported everything and computed nothing: their start costs little.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from utnetv2_fast.data.prepare import PreparedCase
from utnetv2_fast.errors import RunError, Stopped
from utnetv2_fast.models import UTNetV2, UTNetV2Config
from utnetv2_fast.ranks import Ranks
from utnetv2_fast.training import RunFolder, loop, state, train
from utnetv2_fast.training.losses import supervised_loss
from utnetv2_fast.training.parallel import data_parallel, part_of_batch, process_group

CPU = torch.device("cpu")
RUN_ERROR, STOPPED = 3, 4


class SmallNetwork(nn.Sequential):
    """Takes a hundredth of UTNetV2's time."""

    def __init__(self, config: UTNetV2Config) -> None:
        conv = nn.Conv2d(config.in_channels, 8, 3, padding=1)
        super().__init__(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, config.num_classes, 1))


class DoubleNetwork(UTNetV2):
    """Computes in float64, in which rounding does not grow to the size of a small mistake within a few steps."""

    def __init__(self, config: UTNetV2Config) -> None:
        super().__init__(config)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x.double())


def together(work: Callable[[Ranks], None], count: int) -> list[int]:
    """Call `work` in that many processes, which form a group; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            ranks = Ranks(rank, count, rank)
            with process_group(ranks, CPU):
                work(ranks)
            code = 0
        except RunError as error:
            print(error, file=sys.stderr)
            code = RUN_ERROR
        except Stopped:
            code = STOPPED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train_together(
    run: Path,
    cases: list[PreparedCase],
    count: int,
    expected: tuple[int, ...] = (0, 0),
    after_third_step: Callable[[], bool] = lambda: False,
) -> None:
    """Train or go on; the last of the processes calls `after_third_step`. SystemExit for other exit codes."""

    def work(ranks: Ranks) -> None:
        steps = iter(range(1, 100))

        def stop() -> bool:
            return next(steps) == 3 and ranks.rank == 1 and after_third_step()

        train(RunFolder(run), cases[:2], cases[2:], CPU, stop=stop, ranks=ranks)

    codes = together(work, count)
    if codes != list(expected[:count]):
        sys.exit(f"{run}: the {count} processes ended with {codes} instead of {expected[:count]}")


def write_gradients(run: RunFolder, count: int, file: Path) -> None:
    """The loss of one random batch of six, its gradients, and the statistics of the batch norms after it."""

    def work(ranks: Ranks) -> None:
        torch.manual_seed(0)
        config = run.config
        model = UTNetV2(config.model).double().train()
        network = data_parallel(model, CPU) if ranks.count > 1 else model
        image = torch.randn(6, 1, *config.patch_size, dtype=torch.float64)
        label = (
            image[:, 0] + torch.randn_like(image[:, 0]) > torch.linspace(-2, 2, 6).view(6, *[1] * (image.ndim - 2))
        ).long()
        part = part_of_batch(6, ranks)
        mine = slice(part.start, part.stop)
        weights = torch.tensor([0.5, 1.0])  # the loss computes in float32
        loss = supervised_loss(network(image[mine]), label[mine], weights, 0.5)
        loss.backward()
        found = (
            {name: p.grad for name, p in model.named_parameters()}
            | dict(model.named_buffers())
            | {"loss": loss.detach()}
        )
        if ranks.first:
            torch.save(found, file)

    codes = together(work, count)
    if any(codes):
        sys.exit(f"the {count} processes ended with {codes}")


def kill() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def main(template: Path, out: Path, cases: list[PreparedCase], kind: str) -> None:
    def new_run(name: str, source: Path = template) -> Path:
        return Path(shutil.copytree(source, out / name))

    if kind == "gradients":
        out.mkdir()
        for count, name in ((1, "one.pt"), (2, "two.pt")):
            write_gradients(RunFolder(template), count, out / name)
    elif kind == "equal":
        state.build_network = DoubleNetwork  # type: ignore[assignment]
        for count, name in ((1, "one"), (2, "two")):
            train_together(new_run(name), cases, count)
    else:
        state.build_network = SmallNetwork  # type: ignore[assignment]
        train_together(new_run("whole"), cases, 2)
        train_together(new_run("killed"), cases, 2, (RUN_ERROR, -signal.SIGKILL), kill)
        train_together(new_run("stopped"), cases, 2, (STOPPED, STOPPED), lambda: True)
        for name in ("killed", "stopped"):
            train_together(new_run(f"{name}-two", out / name), cases, 2)
            train_together(new_run(f"{name}-one", out / name), cases, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which the first optimiser imports
    loop._NORM_BATCHES, loop._LEAST_VALIDATION_BATCHES = 2, 1
    folder = Path(sys.argv[2])
    parts = ("image", "label", "foreground")
    prepared = [
        PreparedCase(f"case{i}", f"patient{i}", *(folder / f"case{i}.{part}.npy" for part in parts)) for i in range(3)
    ]
    main(Path(sys.argv[1]), Path(sys.argv[3]), prepared, sys.argv[4])
