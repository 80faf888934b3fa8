"""The Ray side of the work: the one place where ``ray.remote`` stands.

Everything that runs in a task is a plain function of other modules.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import ray

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True)
class RaySettings:
    """How to reach the cluster and how much each task may take.

    ``address`` is ``"local"`` (a new cluster on this machine), ``"auto"`` (inside a Ray job) or ``ray://`` /
    ``host:port``; never found by chance.
    """

    address: str = "local"
    num_cpus: int | None = None
    cpus_per_task: float = 1
    max_in_flight: int = 64
    max_retries: int = 3


def _call(function: Callable[[A], R], item: A, threads: int) -> R:
    """Run in a worker: as many threads as the task was given, so that neighbours do not fight for cores."""
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):
        import numba

        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return function(item)


class RayExecutor:
    """Runs plain functions as Ray tasks, a bounded number in flight, and yields results as they come."""

    def __init__(self, settings: RaySettings) -> None:
        self.settings = settings
        self._owned = False

    def __enter__(self) -> Self:
        if not ray.is_initialized():
            os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
            local = self.settings.address == "local"
            ray.init(
                address=self.settings.address,
                num_cpus=self.settings.num_cpus if local else None,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
            )
            self._owned = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned:
            ray.shutdown()

    @property
    def same_machine(self) -> bool:
        """Tell whether workers see this machine's files."""
        return self.settings.address == "local"

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        """Yield ``(index, result)`` in the order of completion; the first failure cancels what is still running and
        is raised as itself.

        ``memory_bytes`` is what one item needs; Ray admits no more tasks to a node than fit.
        """
        settings = self.settings
        options: dict[str, Any] = {"num_cpus": settings.cpus_per_task, "max_retries": settings.max_retries}
        if memory_bytes:
            options["memory"] = memory_bytes
        task = ray.remote(_call).options(**options)
        threads = max(1, int(settings.cpus_per_task))
        waiting = iter(enumerate(items))
        running: dict[Any, int] = {}
        try:
            while True:
                while len(running) < settings.max_in_flight and (following := next(waiting, None)) is not None:
                    index, item = following
                    running[task.remote(function, item, threads)] = index
                if not running:
                    return
                ready, _ = ray.wait(list(running), num_returns=1)
                for reference in ready:
                    yield running.pop(reference), _result(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=False)


def _result(reference: Any) -> Any:
    """Unwrap what the task raised: the caller sees our own error, with the worker's traceback as its cause."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            raise cause from error
        raise
