"""Measure a published version in every mode, on what a device gets, and hold it against the spec's gate.

A mode is measured by ranges of images, so that a job keeps as many workers busy as it has ranges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from jobs.events import StageClock
from jobs.spec.job import EvaluateSpec
from jobs.stages.job import EvaluationImages, Job
from jobs.stages.publishing import TOOLS
from jobs.versions import tool_versions
from storage.digest import digest_bytes
from storage.manifest import Manifest, canonical_json, level_name
from workers.errors import DataError
from workers.evaluate import chance_fault
from workers.executor import Executor
from workers.measure import Measured, MeasuredRange, MeasureTask, join_ranges, measure

RANGE_PIXELS = 250 * 224 * 224
"""Pixels of one task's images, about: a task opens network and image set anew, and should work much longer than that
takes. It follows from the spec alone, so that a run on another cluster finds the same ranges in the ledger."""

RANGE_IMAGES = 2000
"""Images of one task, at most, however small they are."""


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
        progress, parts = clock.progress("evaluate"), dict[int, MeasuredRange]()
        of_float = {index for index, task in enumerate(tasks) if task.level is None}
        for index, part in executor.map(measure, tasks, memory_bytes=job.needs["evaluate"].memory_bytes):
            parts[index] = part
            progress(len(parts), len(tasks))
            # A verdict needs the whole set, and the sooner it is out the less is measured in vain.
            if index in of_float and of_float <= parts.keys():
                _refuse_chance(job, evaluate, [parts[place] for place in sorted(of_float)])
    ordered = tuple(
        join_ranges(
            [parts[index] for index, _ in group],
            mode=task.mode,
            level=task.level,
            activations=task.activations,
            data=evaluate.data,
        )[0]
        for task, group in _by_mode(tasks)
    )
    return replace(job, measured=ordered, fault=gate_fault(evaluate, ordered) if evaluate.has_gate else None)


def measure_tasks(job: Job, evaluate: EvaluateSpec, manifest: Manifest, *, cache: Path | None) -> list[MeasureTask]:
    """Return the tasks mode by mode, a task for each range of images: float, each level from part-bit to full-bit, and
    where there are activation ranges each level with them.
    """
    assert job.judged is not None, "the images to evaluate on were not looked at"
    levels = range(manifest.level_count())
    ranges = any(layer.activation is not None for layer in manifest.layers)
    modes: list[tuple[int | None, bool]] = [(None, False), *((level, False) for level in levels)]
    modes += [(level, True) for level in levels if ranges]
    series = _series(job.judged, evaluate, manifest)
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
            start=start,
            stop=stop,
            batch_size=evaluate.batch_size,
            job=job.digest,
            series=series,
        )
        for level, activations in modes
        for start, stop in image_ranges(
            job.judged.count, pixels=math.prod(job.staged.preprocessing.input_shape[1:]), batch_size=evaluate.batch_size
        )
    ]


def image_ranges(count: int, *, pixels: int, batch_size: int) -> list[tuple[int, int]]:
    """Return start and stop of the ranges of ``count`` images, each of so many pixels; all but the last are whole
    batches, so that the batches are those of one run over all.
    """
    images = min(RANGE_IMAGES, RANGE_PIXELS // pixels)
    step = batch_size * max(1, math.ceil(images / batch_size))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _series(judged: EvaluationImages, evaluate: EvaluateSpec, manifest: Manifest) -> str:
    """Return the name of all that counts rest on beside mode and range: version, images and labels, batches, tools."""
    document = {
        "version": digest_bytes(canonical_json(manifest)),
        "images": judged.digest,
        "batch_size": evaluate.batch_size,
        "tools": tool_versions(TOOLS),
    }
    return digest_bytes(canonical_json(document)).removeprefix("sha256:")[:16]


def _by_mode(tasks: Sequence[MeasureTask]) -> Iterator[tuple[MeasureTask, list[tuple[int, MeasureTask]]]]:
    """Yield the first task of each mode, and all of its tasks with their places."""
    for _, group in itertools.groupby(enumerate(tasks), key=lambda one: one[1].mode_key):
        places = list(group)
        yield places[0][1], places


def _refuse_chance(job: Job, evaluate: EvaluateSpec, parts: Sequence[MeasuredRange]) -> None:
    """Raise `DataError` where the float network's answers have nothing to do with the labels, and nobody said that
    this is meant.
    """
    assert job.judged is not None, "the images to evaluate on were not looked at"
    _, counts = join_ranges(parts, mode="float", level=None, activations=False, data=evaluate.data)
    accuracy = counts.accuracy()
    if not evaluate.accept_chance and job.spec.model.random_seed is None and accuracy.is_chance:
        raise DataError(chance_fault(accuracy, where=evaluate.data, reading=job.judged.reading))


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
