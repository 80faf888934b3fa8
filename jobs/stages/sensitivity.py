"""The stage ``sensitivity``: what the network loses when each layer alone runs part-bit, one task a layer; where bits
are mixed, the bits that follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs.events import StageClock
from jobs.spec.job import JobSpec
from jobs.stages.job import Job
from jobs.stages.memory import sensitivity_need, sensitivity_samples
from jobs.stages.mixed import mixed_bits
from jobs.stages.plan import has_own_bits
from jobs.stages.preparation import plan_of
from workers.executor import Executor
from workers.sensitivity import BATCH_SIZE, SensitivityRecord, SensitivityTask, measure_layer
from workers.tasks import PieceTask


def run(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Measure each layer alone where the spec asks for it, and where bits are mixed choose them and plan anew.

    Raises:
        PlanError: the target of ``quantize.mixed`` cannot be met.
        WorkError, storage.StorageError: naming the layer or file at fault.
    """
    spec = job.spec
    if not spec.measures_layers:
        return job
    records = measure_layers(job, executor, clock)
    job = replace(job, sensitivities=records)
    if spec.quantize.mixed is None:
        return job
    mixed = mixed_bits(spec.quantize.mixed, job.plan, records, job.registry, job=job.digest)
    with clock.stage("plan"):
        plan = plan_of(spec, job.staged, mixed.high_bits)
    return replace(job, mixed=mixed, plan=plan)


def measure_layers(
    job: Job, executor: Executor, clock: StageClock, *, more_bits: Sequence[int] = (), samples: int | None = None
) -> tuple[SensitivityRecord, ...]:
    """Measure every layer, in execution order; those that an earlier run of the job has measured are not run again.

    Args:
        job: the job; its layers are all at ``quantize.bits`` but for overrides.
        executor: who measures.
        clock: hears how many layers are measured, of how many.
        more_bits: further widths to run each layer at, where they are below the next finer one; the full bits too.
        samples: images that damage is measured on; the spec's by default.

    Raises:
        WorkError: naming the layer that cannot be measured, or the image set that cannot be read.
    """
    judged = samples or sensitivity_samples(job)
    tasks = sensitivity_tasks(job, samples=judged, more_bits=more_bits)
    records: dict[int, SensitivityRecord] = {}
    with clock.stage("sensitivity"):
        progress, need = clock.progress("sensitivity"), sensitivity_need(job, judged)
        for index, record in executor.map(measure_layer, tasks, memory_bytes=need.memory_bytes):
            records[index] = record
            progress(len(records), len(tasks))
    return tuple(records[index] for index in sorted(records))


def sensitivity_tasks(job: Job, *, samples: int, more_bits: Sequence[int] = ()) -> list[SensitivityTask]:
    """Return one task a layer: at each width that it may get, or at its own where the spec says it."""
    spec, calibration = job.spec, job.spec.calibration
    return [
        SensitivityTask(
            context=job.context,
            layer=layer,
            index=index,
            candidates=_candidates(spec, layer, more_bits),
            calibrated=spec.recipe == "calibrated",
            data=None if calibration is None else calibration.data,
            samples=samples,
            stop=0 if calibration is None else calibration.samples,
            batch_size=BATCH_SIZE if calibration is None else calibration.batch_size,
        )
        for index, layer in enumerate(job.plan.whole_layers)
    ]


def _candidates(spec: JobSpec, layer: PieceTask, more_bits: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    fixed = spec.quantize.mixed is None or has_own_bits(layer.layer, spec.quantize)
    widths = {layer.bits[-1]} if fixed else set(spec.quantize.high_choices)
    finer = layer.bits[-2] if len(layer.bits) > 1 else layer.bits[0]
    widths |= {width for width in more_bits if width < finer}
    candidates = [(*layer.bits[:-1], width) for width in sorted(widths)] if len(layer.bits) > 1 else [layer.bits]
    if layer.bits[0] in more_bits and layer.bits[:1] not in candidates:
        candidates.append(layer.bits[:1])
    return tuple(candidates)
