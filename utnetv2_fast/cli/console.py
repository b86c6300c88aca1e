"""What every verb shares: where it prints, how it shows progress, how it answers machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
    """Yield `items`, showing progress: a bar in a terminal, else a line on stderr every ten seconds."""
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
