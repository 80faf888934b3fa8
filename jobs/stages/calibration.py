"""The stage ``calibrate``: split the images over the workers, merge their histograms, read the activation ranges."""

from __future__ import annotations

from dataclasses import replace

from jobs.events import StageClock
from jobs.spec.quantize import ActivationSpec
from jobs.stages.job import ActivationRanges, Job
from nestquant.observers import Histogram, activation_range
from storage.manifest import ActivationRange, CalibrationRecord
from workers.calibrate import NOISE_BATCH, CalibrateTask, Observed, observe
from workers.errors import DataError
from workers.executor import Executor
from workers.inputs.images import none_readable

BATCHES_PER_TASK = 2
LAST_LAYER_BITS = 8  # the paper keeps the last layer's input at 8 bits


def run(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Find the activation ranges that the spec asks for; none where it asks for none.

    Raises:
        WorkError: an image set cannot be read, or an activation is not finite.
    """
    with clock.stage("calibrate"):
        activations = job.spec.quantize.activations
        return job if activations is None else replace(job, activations=_ranges(job, activations, executor, clock))


def _ranges(job: Job, activations: ActivationSpec, executor: Executor, clock: StageClock) -> ActivationRanges:
    names = [layer.name for layer in job.plan.layers]
    tasks, progress = calibrate_tasks(job, activations), clock.progress("calibrate")
    observed: dict[int, Observed] = {}
    for index, result in executor.map(observe, tasks, memory_bytes=job.needs["calibrate"].memory_bytes):
        observed[index] = result
        progress(len(observed), len(tasks))
    parts = [observed[index] for index in sorted(observed)]
    samples = sum(part.samples for part in parts)
    skipped = tuple(item for part in parts for item in part.skipped)
    if tasks[0].data is not None and samples == 0:
        raise DataError(none_readable("calibration.data", skipped))
    ranges = {
        name: read_range(name, parts, activations, last=name == names[-1])
        for name in quantized_inputs(names, activations, parts)
    }
    record = CalibrationRecord(
        source_digest=job.observation.digest,
        samples=samples,
        skipped=len(skipped),
        observer=activations.observer,
    )
    return ActivationRanges(ranges, record, skipped)


def calibrate_tasks(job: Job, activations: ActivationSpec) -> list[CalibrateTask]:
    """Return a task for every few batches, the same batches in any split; one of noise where no images are needed."""
    network, images = job.observation.network, job.observation.images
    layers = tuple(layer.name for layer in job.plan.layers)
    if images is None or activations.observer == "sigma":
        return [
            CalibrateTask(network=network, layers=layers, data=None, samples=0, start=0, stop=0, batch_size=NOISE_BATCH)
        ]
    step = images.batch_size * BATCHES_PER_TASK
    return [
        CalibrateTask(
            network=network,
            layers=layers,
            data=images.data,
            samples=images.samples,
            start=start,
            stop=min(start + step, images.samples),
            batch_size=images.batch_size,
        )
        for start in range(0, images.samples, step)
    ]


def quantized_inputs(names: list[str], activations: ActivationSpec, parts: list[Observed]) -> list[str]:
    """Return the layers whose inputs are quantized: the first sees the image itself, which stays float unless the spec
    says otherwise; one that never ran has no range.
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
    extent = activation_range(
        merged, observer=activations.observer, bits=bits, percentile=activations.percentile, sigmas=activations.sigma
    )
    return ActivationRange(
        bits=bits, low=extent.low, high=extent.high, signed=extent.signed, observer=activations.observer
    )
