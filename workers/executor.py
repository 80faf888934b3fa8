"""Who runs the work: this process, or a Ray cluster (``workers.remote``).

Both run the same plain functions and yield the same results.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from storage.registry import Published
from workers.errors import DoesNotFit, Need, Stopped

A = TypeVar("A")
R = TypeVar("R")


class Executor(Protocol):
    """Runs a function over items; several threads may share one."""

    @property
    def same_machine(self) -> bool:
        """Tell whether the workers see this machine's files."""
        ...

    def require(self, need: Need) -> None:
        """Raise `DoesNotFit` where no machine can hold such a task: before work starts, not in it."""
        ...

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        """Yield ``(index, result)`` in any order.

        The first failure ends the submission; what runs already is finished and yielded, then the failure is raised
        as itself.
        """
        ...

    def tell(self, published: Published) -> None:
        """Let whoever watches the work know what publishing a version met."""
        ...

    def stop(self) -> None:
        """Make every ``map``, running or to come, in any thread, cancel its work and raise `Stopped`."""
        ...


class InProcessExecutor:
    """Runs items one after the other, here."""

    same_machine = True

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def require(self, need: Need) -> None:
        """Compare with this machine's memory."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need.memory_bytes > total:
            raise DoesNotFit(need, cpus=1, largest=f"this machine has {total / 1e9:.1f} GB")

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        """Yield results in order.

        ``memory_bytes`` is of no use here.
        """
        for index, item in enumerate(items):
            if self._stopped.is_set():
                raise Stopped
            yield index, function(item)

    def tell(self, published: Published) -> None:
        """Do nothing: nobody watches this process."""

    def stop(self) -> None:
        """Let the item at work end, and start no other."""
        self._stopped.set()
