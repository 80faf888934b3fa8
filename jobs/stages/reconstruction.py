"""The stage ``reconstruct``: layer solved after layer by a gang that shares the calibration images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

from jobs.events import StageClock
from jobs.spec.job import CalibrationSpec
from jobs.stages.job import Job, Reconstruction
from jobs.stages.memory import chunks_of, gang_size, member_need
from workers.errors import DataError, WorkerLost, shown
from workers.executor import Executor, Gang
from workers.inputs.images import none_readable
from workers.reconstruct import Begun, Member, MemberTask
from workers.solutions import SolvedRecord, find_solved


def run(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Solve the layers one after the other; those that an earlier run of the job has solved are not solved again.

    Raises:
        WorkError: naming the layer that cannot be solved, or the image set that cannot be read.
    """
    layers, images = job.plan.solved_layers, job.observation.images
    if not layers:
        return job
    assert images is not None, "a recipe that solves layers has images"
    with clock.stage("reconstruct"):
        solved: dict[int, SolvedRecord] = {}
        for index in range(len(layers)):
            record = find_solved(job.registry, job.digest, index)
            if record is not None:
                solved[index] = record
        if len(solved) < len(layers):
            _solve(job, images, executor, solved, clock.progress("reconstruct"))
    ordered = tuple(solved[index] for index in range(len(layers)))
    notes = without_data((record.layer, record.without) for record in ordered if record.without is not None)
    return replace(job, reconstruction=Reconstruction(ordered, notes))


def without_data(layers: Iterable[tuple[str, str | None]]) -> tuple[str, ...]:
    """Return one line for each reason for which layers were rounded without data: ``(layer, reason)``."""
    reasons: dict[str | None, list[str]] = {}
    for layer, reason in layers:
        reasons.setdefault(reason, []).append(layer)
    return tuple(
        f"{len(names)} layers were rounded without data{'' if reason is None else f' ({reason})'}: {shown(names)}."
        for reason, names in reasons.items()
    )


def _solve(
    job: Job,
    images: CalibrationSpec,
    executor: Executor,
    solved: dict[int, SolvedRecord],
    on_done: Callable[[int, int], None],
) -> None:
    """Solve what is not solved; a gang that loses a member is made again and goes on behind the last solved layer."""
    need_of = functools.partial(member_need, job, images)
    attempts = job.spec.cluster.max_retries
    while True:
        before = len(solved)
        count = gang_size(executor, images, need_of)
        tasks = _members(job, images, count)
        try:
            with executor.gang(Member, tasks, memory_bytes=need_of(count).memory_bytes) as gang:
                _walk(gang, tasks, solved, on_done)
            return
        except WorkerLost:
            attempts = job.spec.cluster.max_retries if len(solved) > before else attempts - 1
            if attempts < 0:
                raise


def _members(job: Job, images: CalibrationSpec, count: int) -> list[MemberTask]:
    """Deal the chunks out; they are the same for any number of members."""
    layers, chunks = job.plan.solved_layers, chunks_of(images)
    context = job.context.model_copy(update={"network": job.observation.network})
    return [
        MemberTask(
            context=context,
            layers=layers,
            level_count=max(len(layer.bits) for layer in layers),
            data=images.data,
            samples=images.samples,
            chunks=tuple(chunks[member::count]),
        )
        for member in range(count)
    ]


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
        raise DataError(none_readable("calibration.data", skipped))
    layers, laned, without = tasks[0].layers, begun[0].laned, dict(begun[0].without)
    # Chunks in their order, whoever holds them.
    places = sorted(
        (start, member, chunk) for member, task in enumerate(tasks) for chunk, (start, _) in enumerate(task.chunks)
    )
    order = [*(at for at in range(len(layers)) if at not in laned), *laned]
    for at in order:
        if at not in solved:
            earlier = tuple(other for other in solved)
            calls = [] if at in without else [(member, (at, chunk, earlier)) for _, member, chunk in places]
            solved[at] = gang.reduce("solve", at, samples, skipped, without.get(at), over="moments", calls=calls)
        on_done(len(solved), len(layers))
