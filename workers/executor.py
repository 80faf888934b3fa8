"""Who runs the work: this process, or a Ray cluster (``workers.on_ray.executor``).

Both run the same plain functions and yield the same results.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from storage.registry import Published
from workers.errors import DoesNotFit, Need, Stopped

A = TypeVar("A")
R = TypeVar("R")


class Gang(Protocol):
    """Objects that keep something between calls, each in a place of its own; see ``Executor.gang``."""

    @property
    def size(self) -> int:
        """Return the number of members."""
        ...

    def each(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every member and return what they return, in the members' order."""
        ...

    def reduce(self, method: str, *args: Any, over: str, calls: Sequence[tuple[int, tuple[Any, ...]]]) -> Any:
        """Call ``method(*args, results)`` of the first member and return what it returns.

        ``results`` iterates over what method ``over`` of members returned: ``calls`` says which member, and its
        arguments, in order. What they return goes from member to member, not through the caller.
        """
        ...


class Executor(Protocol):
    """Runs a function over items; several threads may share one."""

    def places(self, memory_bytes: int) -> int:
        """Return how many tasks that need so much memory can run at once: what a gang may have for members."""
        ...

    def gang(
        self, member: Callable[[A], Any], items: Sequence[A], *, memory_bytes: int = 0
    ) -> AbstractContextManager[Gang]:
        """Make a member of every item, all at the same time; they end with the context, which calls their ``close``.

        Raises `WorkerLost` from any call where a member went away.
        """
        ...

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


class _Here:
    """A gang in this process."""

    def __init__(self, members: Sequence[Any], stopped: threading.Event) -> None:
        self.members, self._stopped = members, stopped
        self.size = len(members)

    def each(self, method: str, *args: Any) -> list[Any]:
        return [getattr(member, method)(*args) for member in self.members]

    def reduce(self, method: str, *args: Any, over: str, calls: Sequence[tuple[int, tuple[Any, ...]]]) -> Any:
        if self._stopped.is_set():
            raise Stopped
        # One result at a time: the next is made when the last is used.
        results = (getattr(self.members[index], over)(*arguments) for index, arguments in calls)
        return getattr(self.members[0], method)(*args, results)


class InProcessExecutor:
    """Runs items one after the other, here."""

    same_machine = True

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def places(self, memory_bytes: int) -> int:
        """Return one: there is this process alone."""
        return 1

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

    @contextmanager
    def gang(self, member: Callable[[A], Any], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[Gang]:
        """Make the members here."""
        members = [member(item) for item in items]
        try:
            yield _Here(members, self._stopped)
        finally:
            for one in members:
                one.close()

    def tell(self, published: Published) -> None:
        """Do nothing: nobody watches this process."""

    def stop(self) -> None:
        """Let the item at work end, and start no other."""
        self._stopped.set()
