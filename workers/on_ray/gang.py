"""A gang on Ray: what each actor is made of, and how its calls are put together (``workers.executor.Gang``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from workers.threads import use_threads


class Seat:
    """An actor's side: holds one member and calls it."""

    def __init__(self, member: Callable[[Any], Any], item: Any, threads: int) -> None:
        use_threads(threads)
        self.member = member(item)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the member."""
        return getattr(self.member, method)(*args)

    def reduce(self, method: str, args: tuple[Any, ...], *results: Any) -> Any:
        """Call a method with an iterator over what others returned."""
        return getattr(self.member, method)(*args, iter(results))


class Await(Protocol):
    """Waits for references and returns what they are; raises what failed."""

    def __call__(self, references: Sequence[Any], /) -> list[Any]:
        """Wait for all of them."""
        ...


class RayGang:
    """The caller's side, over handles of actors; what one returns for another stays in Ray's object store."""

    def __init__(self, actors: Sequence[Any], wait: Await) -> None:
        self._actors, self._wait = actors, wait
        self.size = len(actors)

    def each(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every member, all at the same time."""
        return self._wait([actor.call.remote(method, *args) for actor in self._actors])

    def reduce(self, method: str, *args: Any, over: str, calls: Sequence[tuple[int, tuple[Any, ...]]]) -> Any:
        """Call ``method`` of the first member over what ``over`` of members returns."""
        parts = [self._actors[index].call.remote(over, *arguments) for index, arguments in calls]
        return self._wait([self._actors[0].reduce.remote(method, args, *parts)])[0]
