"""Measure a published version in every mode, on what a device gets, and hold it against the spec's gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from jobs.events import StageClock
from jobs.spec.job import EvaluateSpec
from jobs.stages.job import Job
from storage.manifest import Manifest, level_name
from workers.executor import Executor
from workers.measure import Measured, MeasureTask, measure


def run(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Run the measurements, as many at a time as the executor can, and hold them against the gate.

    Raises:
        WorkError, storage.StorageError: the images or the version cannot be read, or the float network answers by
            chance.
    """
    evaluate = job.spec.evaluate
    if evaluate is None:
        return job
    with clock.stage("evaluate"):
        assert job.pulled is not None, "nothing was pulled back yet"
        cache = job.pulled.cache if executor.same_machine else None
        tasks = measure_tasks(job, evaluate, job.pulled.manifest, cache=cache)
        progress, results = clock.progress("evaluate"), dict[int, Measured]()
        for index, measured in executor.map(measure, tasks, memory_bytes=job.needs["evaluate"].memory_bytes):
            results[index] = measured
            progress(len(results), len(tasks))
    ordered = tuple(results[index] for index in sorted(results))
    return replace(job, measured=ordered, fault=gate_fault(evaluate, ordered) if evaluate.has_gate else None)


def measure_tasks(job: Job, evaluate: EvaluateSpec, manifest: Manifest, *, cache: Path | None) -> list[MeasureTask]:
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
            network=job.staged.network,
            store_uri=job.registry.store.uri,
            name=manifest.name,
            version=manifest.version,
            cache=None if cache is None else str(cache),
            data=evaluate.data,
            limit=evaluate.limit,
            batch_size=evaluate.batch_size,
            refuse_chance=not evaluate.accept_chance and job.spec.model.random_seed is None,
        )
        for level, activations in modes
    ]


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
