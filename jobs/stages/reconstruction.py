"""The stage of the recipe ``calibrated``: layer solved after layer by a gang that shares the calibration images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.spec.job import CalibrationSpec, JobSpec
from jobs.stages.plan import Plan
from jobs.stages.weights import Staged
from storage.manifest import CalibrationRecord
from storage.registry import Registry
from workers.errors import DataError, Need, WorkerLost, shown
from workers.executor import Executor, Gang
from workers.reconstruct import MAX_INPUTS, Begun, Member, MemberTask
from workers.solutions import SolvedRecord, find_solved
from workers.tasks import PieceTask, TaskContext

BATCHES_PER_CHUNK = 2
_MATRICES = 10
"""Matrices ``K x K`` of float64 for each group that the largest step holds at once: moments of two parts, factors."""


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
    calibration: CalibrationSpec,
    staged: Staged,
    plan: Plan,
    executor: Executor,
    *,
    registry: Registry,
    context: TaskContext,
    need_of: Callable[[int], Need],
    on_done: Callable[[int, int], None],
) -> Reconstructed:
    """Solve the layers one after the other; those that an earlier run of the job has solved are not solved again.

    Args:
        spec: the job.
        calibration: the images.
        staged: the model, ready to be read.
        plan: its layers.
        executor: who does the work.
        registry: where solutions are kept.
        context: where tasks read and write.
        need_of: what each of so many members of the gang needs.
        on_done: hears how many layers are solved, of how many.

    Raises:
        WorkError: naming the layer that cannot be solved, or the image set that cannot be read.

    """
    layers = plan.solved_layers
    solved: dict[int, SolvedRecord] = {}
    for index in range(len(layers)):
        record = find_solved(registry, context.job, index)
        if record is not None:
            solved[index] = record
    if len(solved) < len(layers):
        _together(_Work(spec, calibration, staged, layers, context, need_of), executor, solved, on_done)
    ordered = tuple(solved[index] for index in range(len(layers)))
    without = [record.layer for record in ordered if not record.biases]
    notes = (f"{len(without)} layers were rounded without data: {shown(without)}.",) if without else ()
    return Reconstructed(ordered, notes)


def chunks_of(calibration: CalibrationSpec) -> list[tuple[int, int]]:
    """Return start and stop of the chunks that a gang shares, the same for any number of members."""
    step = calibration.batch_size * BATCHES_PER_CHUNK
    return [(start, min(start + step, calibration.samples)) for start in range(0, calibration.samples, step)]


def gang_size(executor: Executor, calibration: CalibrationSpec, need_of: Callable[[int], Need]) -> int:
    """Return the largest number of members that fit beside each other: the more there are, the less each holds."""
    most = len(chunks_of(calibration))
    fitting = (n for n in range(most, 0, -1) if executor.places(need_of(n).memory_bytes) >= n)
    return next(fitting, 1)


def moments_bytes(layer: PieceTask) -> int:
    """Return the memory that a layer's moments and their solution need in a worker, in bytes (from above)."""
    return _MATRICES * 8 * layer.groups * layer.inputs**2 if layer.inputs <= MAX_INPUTS else 0


@dataclass(frozen=True)
class _Work:
    """What every gang of the stage is made of."""

    spec: JobSpec
    calibration: CalibrationSpec
    staged: Staged
    layers: tuple[PieceTask, ...]
    context: TaskContext
    need_of: Callable[[int], Need]

    def members(self, count: int) -> list[MemberTask]:
        """Deal the chunks out; they are the same for any number of members."""
        calibration, model = self.calibration, self.spec.model
        chunks = chunks_of(calibration)
        return [
            MemberTask(
                context=self.context,
                library=model.library,
                arch=model.arch,
                kwargs=model.kwargs,
                layers=self.layers,
                level_count=max(len(layer.bits) for layer in self.layers),
                data=calibration.data,
                samples=calibration.samples,
                chunks=tuple(chunks[member::count]),
                preprocessing=self.staged.preprocessing.to_record(),
            )
            for member in range(count)
        ]


def _together(
    work: _Work, executor: Executor, solved: dict[int, SolvedRecord], on_done: Callable[[int, int], None]
) -> None:
    """Solve what is not solved; a gang that loses a member is made again and goes on behind the last solved layer."""
    attempts = work.spec.cluster.max_retries
    while True:
        before = len(solved)
        count = gang_size(executor, work.calibration, work.need_of)
        tasks = work.members(count)
        try:
            with executor.gang(Member, tasks, memory_bytes=work.need_of(count).memory_bytes) as gang:
                _walk(gang, tasks, solved, on_done)
            return
        except WorkerLost:
            attempts = work.spec.cluster.max_retries if len(solved) > before else attempts - 1
            if attempts < 0:
                raise


def _walk(
    gang: Gang,
    tasks: list[MemberTask],
    solved: dict[int, SolvedRecord],
    on_done: Callable[[int, int], None],
) -> None:
    begun: list[Begun] = gang.each("begin")
    samples = sum(one.samples for one in begun)
    skipped = tuple(image for one in begun for image in one.skipped)
    if samples == 0:
        raise DataError(f"calibration.data: none of the {len(skipped)} images could be read; the first: {skipped[0]}.")
    layers, laned, readable = tasks[0].layers, begun[0].laned, set(begun[0].readable)
    # Chunks in their order, whoever holds them.
    places = sorted(
        (start, member, chunk) for member, task in enumerate(tasks) for chunk, (start, _) in enumerate(task.chunks)
    )
    order = [*(at for at in range(len(layers)) if at not in laned), *laned]
    for at in order:
        if at not in solved:
            done = tuple(other for other in solved)
            calls = [(member, (at, chunk, done)) for _, member, chunk in places] if at in readable else []
            solved[at] = gang.reduce("solve", at, samples, skipped, over="moments", calls=calls)
        on_done(len(solved), len(layers))
