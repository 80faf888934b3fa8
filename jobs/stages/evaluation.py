"""Measure a published version in every mode, on what a device gets, and hold it against the spec's gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from jobs.result import level_name
from jobs.spec.job import EvaluateSpec, JobSpec
from jobs.stages.weights import Staged
from storage.manifest import Manifest
from workers.executor import Executor
from workers.measure import Measured, MeasureTask, measure


def measure_tasks(
    spec: JobSpec, evaluate: EvaluateSpec, staged: Staged, manifest: Manifest, *, store_uri: str, cache: Path | None
) -> list[MeasureTask]:
    """Return one task a mode: float, each level from part-bit to full-bit, and where there are activation ranges each
    level with them.
    """
    levels = range(manifest.level_count())
    ranges = any(layer.activation is not None for layer in manifest.layers)
    modes: list[tuple[int | None, bool]] = [(None, False), *((level, False) for level in levels)]
    modes += [(level, True) for level in levels if ranges]
    return [
        MeasureTask(
            mode=level_name(level, manifest.level_count()),
            level=level,
            activations=activations,
            library=spec.model.library,
            arch=spec.model.arch,
            kwargs=spec.model.kwargs,
            source=staged.source,
            store_uri=store_uri,
            name=manifest.name,
            version=manifest.version,
            cache=None if cache is None else str(cache),
            data=evaluate.data,
            limit=evaluate.limit,
            batch_size=evaluate.batch_size,
            preprocessing=staged.preprocessing.to_record(),
        )
        for level, activations in modes
    ]


def evaluate(
    tasks: Sequence[MeasureTask], executor: Executor, on_done: Callable[[int, int], None], *, memory_bytes: int
) -> tuple[Measured, ...]:
    """Run the measurements, as many at a time as the executor can, and return them in the order of the tasks.

    ``memory_bytes`` is what a task needs.
    """
    results: dict[int, Measured] = {}
    for index, measured in executor.map(measure, tasks, memory_bytes=memory_bytes):
        results[index] = measured
        on_done(len(results), len(tasks))
    return tuple(results[index] for index in sorted(results))


def gate_fault(gate: EvaluateSpec, measured: Sequence[Measured]) -> str | None:
    """Return what falls short of the gate in one line, or None.

    Where activations are quantized, it is their accuracy that counts. Points are compared exactly: what is allowed
    passes.
    """
    quantized = [result for result in measured if result.level is not None]
    counted = [result for result in quantized if result.activations] or quantized
    full, part = max(counted, key=_level), min(counted, key=_level)
    reference = next(result for result in measured if result.level is None)
    if gate.min_part_top1 is not None and part.accuracy.top1 < gate.min_part_top1:
        return f"part-bit top-1 is {part.accuracy.top1:.2f}%, evaluate.min_part_top1 asks for {gate.min_part_top1}%"
    for word, mode, key, allowed in (
        ("full-bit", full, "max_drop", gate.max_drop),
        ("part-bit", part, "max_part_drop", gate.max_part_drop),
    ):
        drop = 100 * (_share(reference) - _share(mode))
        if allowed is not None and drop > Fraction(str(allowed)):
            return f"{word} top-1 lies {float(drop):.2f} points below float, evaluate.{key} allows {allowed}"
    return None


def _share(result: Measured) -> Fraction:
    return Fraction(result.correct, result.total)


def _level(result: Measured) -> int:
    assert result.level is not None
    return result.level
