"""The stage ``sensitivity``: what the network loses when each layer alone runs part-bit, one task a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jobs.spec.job import JobSpec
from jobs.stages.plan import Plan, has_own_bits
from jobs.stages.reconstruction import moments_bytes
from jobs.stages.weights import Staged
from workers.executor import Executor
from workers.reconstruct import MAX_INPUTS
from workers.sensitivity import SensitivityRecord, SensitivityTask, measure_layer
from workers.tasks import PieceTask, TaskContext

NOISE_SAMPLES = 32
"""Images of noise where the job has none of its own."""

_ACTIVATIONS = 16
"""Activations that one forward holds at once, in sizes of its input batch: what ImageNet networks take, from above."""


def measure_sensitivities(
    spec: JobSpec,
    staged: Staged,
    plan: Plan,
    executor: Executor,
    *,
    context: TaskContext,
    on_done: Callable[[int, int], None],
    more_bits: Sequence[int] = (),
    samples: int | None = None,
) -> tuple[SensitivityRecord, ...]:
    """Measure every layer, in execution order; those that an earlier run of the job has measured are not run again.

    Args:
        spec: the job.
        staged: the model, ready to be read.
        plan: its layers, all at ``quantize.bits`` but for overrides.
        executor: who measures.
        context: where tasks read and write.
        on_done: hears how many layers are measured, of how many.
        more_bits: further widths to run each layer at, where they are below the next finer one; the full bits too.
        samples: images that damage is measured on; the spec's by default.

    Raises:
        WorkError: naming the layer that cannot be measured, or the image set that cannot be read.
    """
    tasks = sensitivity_tasks(spec, staged, plan, context=context, more_bits=more_bits, samples=samples)
    done: dict[int, SensitivityRecord] = {}
    for index, record in executor.map(measure_layer, tasks, memory_bytes=sensitivity_bytes(spec, staged, plan)):
        done[index] = record
        on_done(len(done), len(tasks))
    return tuple(done[index] for index in sorted(done))


def sensitivity_tasks(
    spec: JobSpec,
    staged: Staged,
    plan: Plan,
    *,
    context: TaskContext,
    more_bits: Sequence[int] = (),
    samples: int | None = None,
) -> list[SensitivityTask]:
    """Return one task a layer: at each width that it may get, or at its own where the spec says it."""
    calibration = spec.calibration
    return [
        SensitivityTask(
            context=context,
            library=spec.model.library,
            arch=spec.model.arch,
            kwargs=spec.model.kwargs,
            layer=layer,
            index=index,
            candidates=_candidates(spec, layer, more_bits),
            calibrated=spec.quantize.recipe == "calibrated",
            data=None if calibration is None else calibration.data,
            samples=samples or _samples(spec),
            stop=0 if calibration is None else calibration.samples,
            batch_size=32 if calibration is None else calibration.batch_size,
            preprocessing=staged.preprocessing.to_record(),
        )
        for index, layer in enumerate(plan.whole_layers)
    ]


def sensitivity_bytes(spec: JobSpec, staged: Staged, plan: Plan) -> int:
    """Return the memory that the largest task needs in a worker, in bytes (an estimate from above)."""
    calibration, preprocessing = spec.calibration, staged.preprocessing
    image = 4 * len(preprocessing.mean) * preprocessing.size**2
    held = _samples(spec) if calibration is None else max(_samples(spec), calibration.samples)
    batch = 32 if calibration is None else calibration.batch_size
    layers = plan.whole_layers
    largest = max(layer.weights for layer in layers)
    solved = [layer for layer in layers if layer.solution is not None and layer.inputs <= MAX_INPUTS]
    moments = max(map(moments_bytes, solved), default=0)
    # The network and its checkpoint while it is read; the layer as float64, grid and integers.
    return 8 * staged.parameters + 48 * largest + moments + image * (held + _ACTIVATIONS * batch)


def _samples(spec: JobSpec) -> int:
    if spec.calibration is None:
        return NOISE_SAMPLES
    wanted = [section.samples for section in (spec.quantize.mixed, spec.analysis) if section is not None]
    return min(wanted[0] if wanted else 128, spec.calibration.samples)


def _candidates(spec: JobSpec, layer: PieceTask, more_bits: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    widths = {layer.bits[-1]} if has_own_bits(layer.layer, spec.quantize) else set(spec.quantize.high_choices)
    finer = layer.bits[-2] if len(layer.bits) > 1 else layer.bits[0]
    widths |= {width for width in more_bits if width < finer}
    found = [(*layer.bits[:-1], width) for width in sorted(widths)] if len(layer.bits) > 1 else [layer.bits]
    if layer.bits[0] in more_bits and layer.bits[:1] not in found:
        found.append(layer.bits[:1])
    return tuple(found)
