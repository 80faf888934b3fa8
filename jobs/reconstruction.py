"""The stage of the recipe ``calibrated``: layer solved after layer, the moments of each spread over workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from jobs.plan import Plan
from jobs.spec import JobSpec
from jobs.stage import Staged
from nestquant.moments import has_columns
from storage.manifest import CalibrationRecord
from storage.registry import Registry
from workers.errors import DataError, shown
from workers.executor import Executor
from workers.reconstruct import MAX_INPUTS, Gathered, MomentsTask, SolveTask, gather, solve
from workers.solutions import SolvedRecord, find_solved
from workers.tasks import PieceTask, TaskContext

BATCHES_PER_TASK = 2
_MATRICES = 10
"""Matrices ``K x K`` of float64 for each group that the largest task holds at once: moments of two parts, factors."""


@dataclass(frozen=True)
class Reconstructed:
    """The solved layers in execution order, and what people should know of them."""

    layers: tuple[SolvedRecord, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Return the images that could not be read: (name, reason)."""
        return tuple(dict.fromkeys(image for layer in self.layers for image in layer.skipped))

    def record(self, digest: str | None) -> CalibrationRecord | None:
        """Return what the integers rest on; None where images had no part in them."""
        samples = max((layer.samples for layer in self.layers), default=0)
        if not self.layers:
            return None
        return CalibrationRecord(source_digest=digest, samples=samples, skipped=len(self.skipped), observer="moments")


def reconstruct(
    spec: JobSpec,
    staged: Staged,
    plan: Plan,
    executor: Executor,
    *,
    network: nn.Module,
    registry: Registry,
    context: TaskContext,
    on_done: Callable[[int, int], None],
) -> Reconstructed:
    """Solve the layers one after the other; those that an earlier run of the job has solved are not solved again.

    Args:
        spec: the job.
        staged: the model, ready to be read.
        plan: its layers.
        executor: who gathers moments and solves.
        network: its outline.
        registry: where solutions are kept.
        context: where tasks read and write.
        on_done: hears how many layers are solved, of how many.

    Raises:
        WorkError: naming the layer that cannot be solved, or the image set that cannot be read.

    """
    layers = plan.solved_layers
    level_count = max((len(layer.bits) for layer in layers), default=0)
    solved: list[SolvedRecord] = []
    without: list[str] = []
    for index, layer in enumerate(layers):
        readable = has_columns(network.get_submodule(layer.layer)) and layer.inputs <= MAX_INPUTS
        record = find_solved(registry, context.job, index)
        if record is None:
            tasks = _tasks(spec, staged, layers[: index + 1], context, level_count) if readable else []
            record = _solve(tasks, layer, executor, context, level_count=level_count)
        if not record.biases:
            without.append(layer.layer)
        solved.append(record)
        on_done(index + 1, len(layers))
    notes = (f"{len(without)} layers were rounded without data: {shown(without)}.",) if without else ()
    return Reconstructed(tuple(solved), notes)


def moments_bytes(layer: PieceTask) -> int:
    """Return the memory that a layer's moments and their solution need in a worker, in bytes (from above)."""
    return _MATRICES * 8 * layer.groups * layer.inputs**2


def _solve(
    tasks: list[MomentsTask], layer: PieceTask, executor: Executor, context: TaskContext, *, level_count: int
) -> SolvedRecord:
    memory = moments_bytes(layer) if tasks else 0
    found: dict[int, Gathered] = dict(executor.map(gather, tasks, memory_bytes=memory))
    parts = [found[index] for index in sorted(found)]
    samples = sum(part.samples for part in parts)
    skipped = tuple(image for part in parts for image in part.skipped)
    if parts and samples == 0:
        raise DataError(f"calibration.data: none of the {len(skipped)} images could be read; the first: {skipped[0]}.")
    task = SolveTask(
        context=context,
        layer=layer,
        level_count=level_count,
        chunks=tuple(index for index in sorted(found) if found[index].found),
        samples=samples,
        skipped=skipped,
    )
    [(_, record)] = executor.map(solve, [task], memory_bytes=memory)
    return record


def _tasks(
    spec: JobSpec, staged: Staged, layers: tuple[PieceTask, ...], context: TaskContext, level_count: int
) -> list[MomentsTask]:
    """One task for every few batches, the same batches in any split."""
    calibration = spec.calibration
    assert calibration is not None
    step = calibration.batch_size * BATCHES_PER_TASK
    return [
        MomentsTask(
            context=context,
            library=spec.model.library,
            arch=spec.model.arch,
            kwargs=spec.model.kwargs,
            layer=layers[-1],
            solved=layers[:-1],
            level_count=level_count,
            data=calibration.data,
            start=start,
            stop=min(start + step, calibration.samples),
            batch_size=calibration.batch_size,
            preprocessing=staged.preprocessing.to_record(),
            chunk=chunk,
        )
        for chunk, start in enumerate(range(0, calibration.samples, step))
    ]
