"""The Ray side of the work: the one place where ``ray.remote`` stands.

Everything that runs in a task is a plain function of other modules.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from storage.errors import StoreUnavailable
from storage.registry import Published
from workers.errors import DoesNotFit, Need, NoCluster, Stopped, WorkerLost, WorkError, system_line
from workers.executor import Gang
from workers.on_ray.deadline import deadline
from workers.on_ray.gang import RayGang, Seat
from workers.on_ray.imports import import_fault
from workers.on_ray.telemetry import count_commits, observed
from workers.threads import use_threads

A = TypeVar("A")
R = TypeVar("R")

_POLL_S = 1.0
_CANCEL_S = 10.0
_NO_NODE_S = 60.0
_CONNECT_S = 10.0
_AWAY_S = 15.0
_MIN_WINDOW = 4
_LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ActorDiedError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.TaskUnschedulableError,
    ray.exceptions.RaySystemError,
)


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
    task_timeout_s: float | None = None
    node_timeout_s: float = 0
    json_logs: bool = False


def _call(function: Callable[[A], R], item: A, threads: int, timeout_s: float | None) -> R:
    """Run in a worker: as many threads as the task was given, so that neighbours do not fight for cores."""
    use_threads(threads)
    try:
        with deadline(timeout_s):
            return observed(function, item)
    except StoreUnavailable:
        # Its own retries take seconds; those of the task are to outlast a store that is away for a minute.
        time.sleep(_AWAY_S)
        raise


class RayExecutor:
    """Runs plain functions as Ray tasks, a bounded number in flight, and yields results as they come.

    Safe to share between threads: each ``map`` has its own window.
    """

    def __init__(self, settings: RaySettings) -> None:
        self.settings = settings
        self._owned = False
        self._prints = contextlib.ExitStack()
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        if not ray.is_initialized():
            _check_address(self.settings.address)
            os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
            # Ray warns through its logger that a local cluster asks for a token, which is what we want of it.
            logging.getLogger("ray").setLevel(logging.ERROR)
            # A task killed for memory is tried so often, not for ever.
            os.environ.setdefault("RAY_task_oom_retries", str(self.settings.max_retries))
            local = self.settings.address == "local"
            try:
                ray.init(
                    address=self.settings.address,
                    num_cpus=self.settings.num_cpus if local else None,
                    include_dashboard=False if local else None,
                    log_to_driver=False,
                    logging_level="ERROR",
                    configure_logging=False,
                    logging_config=ray.LoggingConfig(encoding="JSON") if self.settings.json_logs else None,
                )
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
                raise NoCluster(
                    f"cluster.address {self.settings.address!r}: {first_line}. 'local' starts a Ray on this machine."
                ) from error
            self._owned = True
        # Ray prints what becomes of nodes on standard output, where a program may be waiting for our JSON.
        self._prints.enter_context(contextlib.redirect_stdout(sys.stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._prints:  # Ray holds some of its lines back until it ends
            if self._owned:
                ray.shutdown()

    @property
    def same_machine(self) -> bool:
        """Tell whether workers see this machine's files."""
        return self.settings.address == "local"

    def stop(self) -> None:
        """Make every ``map`` cancel its tasks and raise `Stopped`."""
        self._stopped.set()

    def tell(self, published: Published) -> None:
        """Count what publishing met (``nestquant_commits``)."""
        count_commits(published)

    def require(self, need: Need) -> None:
        """Raise `DoesNotFit` where no node can hold a task; a cluster that grows gets ``node_timeout_s`` to grow.

        A task that fits nowhere would wait in Ray's queue for ever.
        """
        bundle = {"CPU": self.settings.cpus_per_task, "memory": need.memory_bytes}
        give_up = time.monotonic() + self.settings.node_timeout_s
        growing = False
        try:
            while not any(_holds(node, bundle) for node in _nodes()):
                if time.monotonic() >= give_up:
                    raise DoesNotFit(need, cpus=self.settings.cpus_per_task, largest=_largest(_nodes()))
                if self._stopped.wait(_POLL_S):
                    raise Stopped
                if not growing:
                    from ray.autoscaler.sdk import request_resources

                    request_resources(bundles=[bundle])
                    growing = True
        finally:
            if growing:
                request_resources(bundles=[])

    def places(self, memory_bytes: int) -> int:
        """Return how many tasks that need so much memory the cluster can run at once, were it free."""
        bundle = {"CPU": self.settings.cpus_per_task, "memory": float(memory_bytes)}
        resources = {name: amount for name, amount in bundle.items() if amount}
        return sum(int(min(node.get(name, 0.0) // amount for name, amount in resources.items())) for node in _nodes())

    @contextlib.contextmanager
    def gang(self, member: Callable[[A], Any], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[Gang]:
        """Make an actor of every item, once there is room for all of them: half a gang would wait for the other half
        for ever, and so would two gangs that have half the cluster each.
        """
        bundle = {"CPU": self.settings.cpus_per_task, "memory": float(memory_bytes)}
        group = placement_group([bundle] * len(items), strategy="PACK")
        actors: list[Any] = []
        try:
            self._await([group.ready()], places=len(items), memory_bytes=memory_bytes)
            options = {"num_cpus": self.settings.cpus_per_task, "memory": memory_bytes or None}
            threads = max(1, int(self.settings.cpus_per_task))
            for index, item in enumerate(items):
                place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                seats = ray.remote(Seat).options(**options, scheduling_strategy=place)
                actors.append(seats.remote(member, item, threads))
            yield RayGang(actors, self._await)
        finally:
            for actor in actors:
                ray.kill(actor)
            remove_placement_group(group)

    def _await(self, references: Sequence[Any], *, places: int = 0, memory_bytes: int = 0) -> list[Any]:
        """Wait for all and return what they are.

        Raises `Stopped` where the work is cancelled, the first failure where one fails. With ``places``, wait for as
        long as the cluster could still give so many at once; else for a task's time-out.
        """
        results: dict[Any, Any] = {}
        waiting, since = list(references), time.monotonic()
        timeout_s = self.settings.task_timeout_s
        while waiting:
            if self._stopped.is_set():
                raise Stopped
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_S)
            results |= {reference: _result(reference, references.index(reference)) for reference in ready}
            waited_s = time.monotonic() - since
            if places and self.places(memory_bytes) >= places:
                since = time.monotonic()
            elif places and waited_s > max(self.settings.node_timeout_s, _NO_NODE_S):
                request = f"{places} workers with {memory_bytes / 1e9:.1f} GB each are wanted at once"
                raise WorkerLost(f"{request}; {_largest(_nodes())}.")
            elif not places and timeout_s and waited_s > timeout_s:
                raise WorkError(f"A step took more than cluster.task_timeout_s, {timeout_s:g} s.")
        return [results[reference] for reference in references]

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        """Yield ``(index, result)`` in the order of completion.

        After a failure nothing more is submitted; what is in flight ends and is yielded, and then the first failure
        is raised as itself. ``memory_bytes`` is what one item needs; Ray admits no more tasks to a node than fit.
        """
        settings = self.settings
        options: dict[str, Any] = {
            "num_cpus": settings.cpus_per_task,
            "max_retries": settings.max_retries,
            # A store that stays away longer than its own retries: somebody else, a little later, may reach it.
            "retry_exceptions": [StoreUnavailable],
        }
        if memory_bytes:
            options["memory"] = memory_bytes
        task = ray.remote(_call).options(**options)
        threads = max(1, int(settings.cpus_per_task))
        window = _Window(settings, memory_bytes)
        waiting = iter(enumerate(items))
        running: dict[Any, int] = {}
        failure: Exception | None = None
        try:
            while True:
                if self._stopped.is_set():
                    raise Stopped
                while failure is None and len(running) < window.size():
                    following = next(waiting, None)
                    if following is None:
                        break
                    index, item = following
                    running[task.remote(function, item, threads, settings.task_timeout_s)] = index
                if not running:
                    break
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_S)
                if not ready:
                    window.check_nodes()
                for reference in ready:
                    index = running.pop(reference)
                    try:
                        result = _result(reference, index)
                    except Exception as error:  # raised below, when the others are done
                        failure = failure or error
                    else:
                        yield index, result
        finally:
            _cancel(list(running))
        if failure is not None:
            raise failure


class _Window:
    """How many tasks may be in flight: twice what the cluster can run at once, so that no CPU waits for the driver
    and a growing cluster sees demand; never more than the settings allow.
    """

    def __init__(self, settings: RaySettings, memory_bytes: int) -> None:
        self.settings, self.memory_bytes = settings, memory_bytes
        self._size, self._until_s, self._fitted_s = 0, 0.0, time.monotonic()

    def size(self) -> int:
        """Return how many tasks may be in flight now."""
        self._look()
        return self._size

    def check_nodes(self) -> None:
        """Raise `WorkerLost` where no node could run a task for too long: Ray would wait for one for ever."""
        self._look()
        patience = max(self.settings.node_timeout_s, _NO_NODE_S)
        if time.monotonic() - self._fitted_s > patience:
            raise WorkerLost(
                f"No node has been able to run a task for {patience:g} s; {_largest(_nodes())}. "
                "Finished units are kept; the same command goes on from there."
            )

    def _look(self) -> None:
        now = time.monotonic()
        if now < self._until_s:
            return
        nodes = _nodes()
        slots = sum(node.get("CPU", 0.0) for node in nodes) / self.settings.cpus_per_task
        self._size = min(self.settings.max_in_flight, max(_MIN_WINDOW, int(2 * slots)))
        if any(_holds(node, {"CPU": self.settings.cpus_per_task, "memory": self.memory_bytes}) for node in nodes):
            self._fitted_s = now
        self._until_s = now + _POLL_S


def _check_address(address: str) -> None:
    """Raise `NoCluster` where nothing answers: Ray itself would go on trying for many minutes."""
    if address in ("local", "auto"):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # the port is no number
        host, port = None, None
    if parts.scheme not in ("", "ray") or not host or not port:
        raise NoCluster(
            f"cluster.address {address!r}: expected 'local', 'auto' (on a node of the cluster) or a head's host:6379. "
            "A dashboard's http:// address is for 'nestquant submit --address'."
        )
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise NoCluster(
            f"cluster.address {address!r}: nothing answers there ({system_line(error)}). Is the cluster up, and "
            "its port open to this machine? 'nestquant submit' needs its dashboard alone."
        ) from error


def _nodes() -> list[dict[str, float]]:
    """Return the resources of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _holds(node: dict[str, float], bundle: dict[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in bundle.items())


def _largest(nodes: list[dict[str, float]]) -> str:
    if not nodes:
        return "the cluster has no node"
    memory, cpus = max((node.get("memory", 0.0), node.get("CPU", 0.0)) for node in nodes)
    return f"the largest of {len(nodes)} nodes offers {memory / 1e9:.1f} GB and {cpus:g} CPUs"


def _cancel(running: list[Any]) -> None:
    """End what still runs: first as an interrupt that lets the task clean up, then with its process."""
    for reference in running:
        ray.cancel(reference, force=False)
    if running:
        _, stuck = ray.wait(running, num_returns=len(running), timeout=_CANCEL_S)
        for reference in stuck:
            ray.cancel(reference, force=True)


def _result(reference: Any, index: int) -> Any:
    """Unwrap what the task raised: the caller sees our own error, with the worker's traceback as its cause."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, _LOST):  # whoever should have made one of its arguments
            raise _lost(cause, index) from error
        if isinstance(cause, Exception):
            raise cause from error
        raise
    except _LOST as error:
        raise _lost(error, index) from error


def _lost(error: BaseException, index: int) -> WorkError:
    if (fault := import_fault(error)) is not None:
        return fault
    first_line = str(error).strip().splitlines()[0]
    return WorkerLost(
        f"Task {index} lost its worker once too often ({type(error).__name__}: {first_line}). Too little memory "
        "(store.shard_bytes, cluster.cpus_per_task) or a task stuck beyond cluster.task_timeout_s are the usual "
        "causes; finished units are kept, the same command goes on from there."
    )
