"""Who runs the work: this process, or a Ray cluster (``workers.remote``).

Both run the same plain functions and yield the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

A = TypeVar("A")
R = TypeVar("R")


class Executor(Protocol):
    """Runs a function over items."""

    @property
    def same_machine(self) -> bool:
        """Tell whether the workers see this machine's files."""
        ...

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        """Yield ``(index, result)`` in any order; the first failure is raised as itself and ends the rest."""
        ...


class InProcessExecutor:
    """Runs items one after the other, here."""

    same_machine = True

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        """Yield results in order.

        ``memory_bytes`` is of no use here.
        """
        for index, item in enumerate(items):
            yield index, function(item)
