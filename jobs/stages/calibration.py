"""Activation ranges: split the calibration set over the workers, merge their histograms, read the ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.spec.job import ActivationSpec, JobSpec
from jobs.stages.plan import Plan
from jobs.stages.weights import Staged
from nestquant.observers import Histogram, activation_range
from storage.manifest import ActivationRange, CalibrationRecord
from workers.calibrate import NOISE_BATCH, CalibrateTask, Observed, observe
from workers.errors import DataError
from workers.executor import Executor

BATCHES_PER_TASK = 2
LAST_LAYER_BITS = 8  # the paper keeps the last layer's input at 8 bits


@dataclass(frozen=True)
class Calibrated:
    """Ranges by layer, the record of what they rest on, and the images that could not be read."""

    ranges: dict[str, ActivationRange]
    record: CalibrationRecord | None
    skipped: tuple[tuple[str, str], ...]


def calibrate(
    spec: JobSpec,
    staged: Staged,
    plan: Plan,
    executor: Executor,
    *,
    digest: str | None,
    memory_bytes: int,
    on_done: Callable[[int, int], None],
) -> Calibrated:
    """Find the activation ranges that the spec asks for; none where it asks for none.

    ``memory_bytes`` is what a task needs.

    Raises:
        WorkError: an image set cannot be read, or an activation is not finite.
    """
    activations = spec.quantize.activations
    if activations is None:
        return Calibrated({}, None, ())
    names = [layer.name for layer in plan.layers]
    tasks = _tasks(spec, staged, tuple(names))
    observed: dict[int, Observed] = {}
    for index, result in executor.map(observe, tasks, memory_bytes=memory_bytes):
        observed[index] = result
        on_done(len(observed), len(tasks))
    parts = [observed[index] for index in sorted(observed)]
    samples = sum(part.samples for part in parts)
    skipped = tuple(item for part in parts for item in part.skipped)
    if tasks[0].data is not None and samples == 0:
        raise DataError(f"calibration.data: none of the {len(skipped)} images could be read; the first: {skipped[0]}.")
    ranges = {
        name: read_range(name, parts, activations, last=name == names[-1])
        for name in _quantized_inputs(names, activations, parts)
    }
    record = CalibrationRecord(
        source_digest=digest, samples=samples, skipped=len(skipped), observer=activations.observer
    )
    return Calibrated(ranges, record, skipped)


def _tasks(spec: JobSpec, staged: Staged, layers: tuple[str, ...]) -> list[CalibrateTask]:
    """One task for every few batches, the same batches in any split; one task of noise where no images are needed."""
    common: dict[str, Any] = {
        "library": spec.model.library,
        "arch": spec.model.arch,
        "kwargs": spec.model.kwargs,
        "source": staged.source,
        "layers": layers,
        "preprocessing": staged.preprocessing.to_record(),
    }
    calibration = spec.calibration
    assert spec.quantize.activations is not None
    if calibration is None or spec.quantize.activations.observer == "sigma":
        return [CalibrateTask(**common, data=None, samples=0, start=0, stop=0, batch_size=NOISE_BATCH)]
    step = calibration.batch_size * BATCHES_PER_TASK
    return [
        CalibrateTask(
            **common,
            data=calibration.data,
            samples=calibration.samples,
            start=start,
            stop=min(start + step, calibration.samples),
            batch_size=calibration.batch_size,
        )
        for start in range(0, calibration.samples, step)
    ]


def _quantized_inputs(names: list[str], activations: ActivationSpec, parts: list[Observed]) -> list[str]:
    """The first layer sees the image itself, which stays float unless the spec says otherwise; a layer that never ran
    has no range.
    """
    chosen = names if activations.first_layer == "quantized" else names[1:]
    return [name for name in chosen if any(name in part.histograms for part in parts)]


def read_range(name: str, parts: list[Observed], activations: ActivationSpec, *, last: bool) -> ActivationRange:
    """Merge a layer's histograms and read its range as the spec's observer does."""
    merged = Histogram.empty()
    for part in parts:
        if name in part.histograms:
            merged = merged.merge(Histogram.from_dict(part.histograms[name]))
    bits = max(activations.bits, LAST_LAYER_BITS) if last else activations.bits
    found = activation_range(
        merged, observer=activations.observer, bits=bits, percentile=activations.percentile, sigmas=activations.sigma
    )
    return ActivationRange(
        bits=bits, low=found.low, high=found.high, signed=found.signed, observer=activations.observer
    )
