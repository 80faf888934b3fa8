"""What a Ray worker tells Prometheus and its log about each task.

Metrics go through ``ray.util.metrics``: every node's agent serves them on the port that ``ray start`` was given as
``--metrics-export-port``, with Ray's own beside them (``ray_tasks`` counts retries, by ``IsRetry``). Log lines carry
job, task and layers, and are JSON where the driver asked for it (``RaySettings.json_logs``).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.util.metrics import Counter, Histogram

from storage.registry import Published
from workers.tasks import Bundle, GroupRecord, UnitResult

A = TypeVar("A")
R = TypeVar("R")

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
log = logging.getLogger("nestquant.worker")


@dataclass(frozen=True)
class _Metrics:
    tasks: Counter
    seconds: Histogram
    units: Counter
    moved: Counter
    commits: Counter


@functools.cache
def _metrics() -> _Metrics:
    """One set for each process."""
    return _Metrics(
        tasks=Counter("nestquant_tasks", "Tasks that ended, by function and outcome.", ("function", "outcome")),
        seconds=Histogram("nestquant_task_seconds", "Seconds that a task ran.", _SECONDS, ("function",)),
        units=Counter(
            "nestquant_units", "Shard groups and base blobs, and whether an earlier run had done them.", ("reused",)
        ),
        moved=Counter("nestquant_bytes", "Bytes read from checkpoints and written to the store.", ("direction",)),
        commits=Counter("nestquant_commits", "Versions published, and what their commits met.", ("outcome",)),
    )


def observed(function: Callable[[A], R], item: A) -> R:
    """Run a task and tell what it did."""
    metrics, name, begin = _metrics(), getattr(function, "__name__", "task"), time.perf_counter()
    fields: dict[str, Any] = {"task": name}
    if isinstance(item, Bundle):
        fields |= {"job": item.context.job, "source": item.context.network.source.key}
    try:
        result = function(item)
    except BaseException as error:
        metrics.tasks.inc(tags={"function": name, "outcome": type(error).__name__})
        log.warning("task failed", extra={**fields, "error": f"{type(error).__name__}: {error}"})
        raise
    seconds = time.perf_counter() - begin
    metrics.tasks.inc(tags={"function": name, "outcome": "done"})
    metrics.seconds.observe(seconds, tags={"function": name})
    for one in result if isinstance(result, list) else ():
        if isinstance(one, UnitResult):
            _count(one, fields)
    return result


def count_commits(published: Published) -> None:
    """Count a version, and the races for a number and the answers of the store that were lost on its way."""
    log.info(
        "version published" if published.created else "version was there",
        extra={"published": published.name, "version": published.version, "lost_races": published.lost_races},
    )
    outcomes = {
        "created" if published.created else "unchanged": 1,
        "lost race": published.lost_races,
        "retried": published.retries,
    }
    for outcome, count in outcomes.items():
        if count:
            _metrics().commits.inc(count, tags={"outcome": outcome})


def _count(unit: UnitResult, fields: dict[str, Any]) -> None:
    metrics = _metrics()
    metrics.units.inc(tags={"reused": str(unit.reused).lower()})
    for direction, size in (("read", unit.bytes_read), ("written", unit.bytes_written)):
        if size:
            metrics.moved.inc(size, tags={"direction": direction})
    layers = [piece.layer for piece in unit.record.pieces] if isinstance(unit.record, GroupRecord) else []
    log.info(
        "unit reused" if unit.reused else "unit stored",
        extra={
            **fields,
            "unit": f"{unit.record.kind}-{unit.record.index}",
            "layers": list(dict.fromkeys(layers)),
            "seconds": round(unit.seconds, 4),
        },
    )
