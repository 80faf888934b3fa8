"""The stage of the recipe ``data_free``: an image set made from chance, and the network fitted to it.

What comes out takes the place of the calibration set and of the checkpoint for the stages that look at activations;
weights are the same in both networks, and what is published comes from the checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.spec.job import CalibrationSpec, JobSpec
from jobs.stages.weights import Staged
from storage.registry import Registry
from workers.checkpoint import stored_file
from workers.executor import Executor
from workers.synthesize import JoinTask, SynthesizeTask, find_synthetic, join, synthesize
from workers.tasks import TaskContext
from workers.tensors import TensorSource

SAMPLES = 128
CHUNK = 32
"""Images of one chunk, each with statistics of its own: fewer would not do for the layers with few positions."""

_COPIES = 4
"""Copies of the float weights that a task holds at once: the network, its state, the file."""


@dataclass(frozen=True)
class Synthetic:
    """Images to calibrate on, the network that fits them, and the digest of the images."""

    calibration: CalibrationSpec
    source: TensorSource
    digest: str


def make_synthetic(
    spec: JobSpec,
    staged: Staged,
    executor: Executor,
    *,
    registry: Registry,
    context: TaskContext,
    on_done: Callable[[int, int], None],
) -> Synthetic:
    """Make the images of a job, or find those that an earlier run of it has made.

    Raises:
        WorkError: the network is not finite on them, or takes images that are neither grey nor coloured.
    """
    record = find_synthetic(registry, context.job)
    if record is None:
        network = {"library": spec.model.library, "arch": spec.model.arch, "kwargs": spec.model.kwargs}
        tasks = [
            SynthesizeTask(
                context=context,
                **network,
                preprocessing=staged.preprocessing.to_record(),
                samples=min(CHUNK, SAMPLES - start),
                chunk=chunk,
            )
            for chunk, start in enumerate(range(0, SAMPLES, CHUNK))
        ]
        memory = _COPIES * sum(info.size_bytes for info in staged.tensors.values())
        for done, _ in enumerate(executor.map(synthesize, tasks, memory_bytes=memory), start=1):
            on_done(done, len(tasks))
        joining = JoinTask(context=context, **network, chunks=len(tasks))
        [(_, record)] = executor.map(join, [joining], memory_bytes=memory)
    source = staged.source if record.network is None else TensorSource(registry.store.uri, record.network)
    data = stored_file(registry.store.uri, record.images)
    return Synthetic(CalibrationSpec(data=data, samples=record.samples, batch_size=CHUNK), source, record.digest)
