"""What every verb shares: where it prints, how it shows progress, how it answers machines."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from utnetv2_fast.errors import Stopped
from utnetv2_fast.progress import Track
from utnetv2_fast.ranks import ranks_of_this_job

T = TypeVar("T")

console = Console()  # results
messages = Console(stderr=True)  # progress and remarks, so that stdout stays clean for `--json` and pipes

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

SECONDS_BETWEEN_LINES = 10.0


def print_json(value: Any) -> None:
    """Print `value` on stdout as one JSON object; not-a-number becomes null, which JSON can say."""
    sys.stdout.write(json.dumps(_without_nan(value), indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """Paths as text, numbers of numpy and torch as numbers."""
    return value.item() if hasattr(value, "item") else str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def track(items: Sequence[T], description: str, /) -> Iterable[T]:
    """Yield `items`, showing progress: a bar in a terminal, else a line on stderr every ten seconds.

    Of several ranks only the first shows its own.
    """
    if not ranks_of_this_job().first:
        return items
    return _bar(items, description) if messages.is_terminal else _lines(items, description)


def _bar(items: Sequence[T], description: str) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=messages) as progress:
        yield from progress.track(items, description=description)


def _lines(items: Sequence[T], description: str) -> Iterator[T]:
    start = shown = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            left = (now - start) / done * (len(items) - done)
            sys.stderr.write(f"{description}: {done}/{len(items)}, {left:.0f} s left\n")
        yield item
    if shown > start:
        sys.stderr.write(f"{description}: {len(items)}/{len(items)}, {time.monotonic() - start:.0f} s\n")


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM or Ctrl-C has come. The second one ends the program at once.

    A signal that the program was started to ignore, as under nohup, stays ignored. Of several ranks none ends at once:
    SLURM and torchrun both tell each of them, and torchrun ends those that take longer than half a minute.
    """
    came = False
    ranks = ranks_of_this_job()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if ranks.count > 1:
            message = b"" if came or not ranks.first else b"\nStopping as soon as what is at work is saved.\n"
        else:
            signal.signal(number, before[signal.Signals(number)])
            message = b"\nStopping as soon as what is at work is saved; once more stops at once.\n"
        came = True
        # Not through sys.stderr, which the interrupted code may just be writing to.
        os.write(2, message)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    obeyed = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in obeyed:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number in obeyed:
            signal.signal(number, before[number])


def stopping(track: Track, stop: Callable[[], bool]) -> Track:
    """`track`, but it raises Stopped between two items when `stop()` is true."""

    def track_until(items: Sequence[T], description: str, /) -> Iterable[T]:
        for done, item in enumerate(track(items, description)):
            if stop():
                raise Stopped(f"{description}: stopped after {done} of {len(items)}.")
            yield item

    return track_until
