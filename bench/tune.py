"""Finds block sizes for the Triton kernels on this GPU and writes them to kernels/tables/, one file per architecture.

Every call of the networks starts from the blocks that the kernels choose by rule. One field at a time is doubled or
halved; what is faster and gives the same results stays, until nothing helps. Minutes of work: `--match` and `--minutes`
do it in parts, and the table is written after every call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.calls import Run, calls
from bench.gpu import median_milliseconds
from utnetv2_fast.kernels import launch

GPU = torch.device("cuda", 0)
TABLES = Path(__file__).parents[1] / "kernels" / "tables"
LEAST_GAIN = 1.03  # below that a change is noise
# Beside the blocks by rule, of the largest value.
WORST_ERROR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
Blocks = dict[str, int]


class Question(NamedTuple):
    """What a launcher asks of the table, and what it would do without an answer."""

    kernel: str
    key: str
    by_rule: Blocks


@contextmanager
def answered(answer: Callable[[Question], Blocks]) -> Iterator[None]:
    """Launchers that ask for blocks are answered by `answer`."""

    def tuned(kernel: str, device: torch.device, key: str, by_rule: Blocks) -> Blocks:
        return answer(Question(kernel, key, by_rule))

    original = launch.tuned
    modules = [m for name, m in sys.modules.items() if name.startswith("utnetv2_fast.kernels.") and hasattr(m, "tuned")]
    for module in modules:
        module.tuned = tuned  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.tuned = original  # type: ignore[attr-defined]


def questions(run: Run) -> list[Question]:
    asked: dict[tuple[str, str], Question] = {}

    def by_rule(question: Question) -> Blocks:
        asked[question.kernel, question.key] = question
        return question.by_rule

    with answered(by_rule):
        run()
    return list(asked.values())


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """One field doubled or halved; warps and stages within what Triton takes."""
    for field, value in blocks.items():
        for other in (2 * value, value // 2):
            if other >= 1 and not (field == "num_warps" and other > 16) and not (field == "num_stages" and other > 4):
                yield blocks | {field: other}


def milliseconds(run: Run, question: Question, blocks: Blocks, expected: tuple[Tensor, ...]) -> float:
    """Of a run in which the question is answered by `blocks`; infinite where that fails or changes the results."""
    with answered(lambda asked: blocks if asked[:2] == question[:2] else asked.by_rule):
        try:
            results = run()
            torch.cuda.synchronize()
        except Exception as error:  # whatever a compiler makes of blocks that do not fit
            if any(word in str(error).lower() for word in ("illegal", "misaligned", "unspecified launch")):
                raise  # the GPU's state is lost
            return float("inf")
        for result, wanted in zip(results, expected, strict=True):
            difference = (result.float() - wanted.float()).abs().max()
            if not difference <= WORST_ERROR[wanted.dtype] * wanted.float().abs().max():
                return float("inf")
        return median_milliseconds({"run": run})["run"]


def best_blocks(run: Run, question: Question, ends: float, say: Callable[[str], None]) -> Blocks | None:
    """The fastest found by changing one field at a time; None where the rule's are."""
    with answered(lambda asked: asked.by_rule):
        expected = run()
    best, shortest = question.by_rule, milliseconds(run, question, question.by_rule, expected)
    tried = [best]
    improved = True
    while improved and time.monotonic() < ends:
        improved = False
        for blocks in neighbours(best):
            if blocks in tried or time.monotonic() > ends:
                continue
            tried.append(blocks)
            took = milliseconds(run, question, blocks, expected)
            if took * LEAST_GAIN < shortest:
                say(f"  {question.kernel}: {shortest:.4f} -> {took:.4f} ms with {blocks}")
                best, shortest, improved = blocks, took, True
                break
    return best if best != question.by_rule else None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description=__doc__,
        epilog="Example: PYTHONPATH=. python -m bench.tune --match depthwise --minutes 9",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--match", default="", metavar="TEXT", help="only calls whose name contains this")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long (default: 60)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of the table in kernels/tables/")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    ends = time.monotonic() + 60 * options.minutes
    out = options.out or TABLES / f"{launch.architecture(GPU)}.json"
    table: dict[str, dict[str, Blocks]] = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    done: set[tuple[str, str]] = set()
    for call in sorted(calls(GPU), key=lambda call: not call.main):
        if options.match not in call.name or time.monotonic() > ends:
            continue
        print(call.name, flush=True)
        run = call.prepare()
        for question in questions(run):
            if question[:2] in done:
                continue
            done.add(question[:2])
            found = best_blocks(run, question, ends, lambda text: print(text, flush=True))
            if found is not None:
                table.setdefault(question.kernel, {})[question.key] = found
                out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
