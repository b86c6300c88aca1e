"""How long work tells of its progress: library functions take a `track`, the command line passes a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    def __call__(self, items: Sequence[T], description: str, /) -> Iterable[T]:
        """Yield `items` in order, showing under `description` how far along they are."""
        ...


def silent(items: Sequence[T], description: str, /) -> Iterable[T]:
    """The default `track`: shows nothing."""
    return items
