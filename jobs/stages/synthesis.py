"""The stage ``synthesize`` of the recipe ``data_free``: an image set made from chance, and the network fitted to it.

What comes out takes the place of the calibration set and of the checkpoint for the stages that look at activations;
weights are the same in both networks, and what is published comes from the checkpoint itself.
"""

from __future__ import annotations

from dataclasses import replace

from jobs.events import StageClock
from jobs.spec.job import CalibrationSpec
from jobs.stages.job import Job, Observation
from workers.executor import Executor
from workers.inputs.files import stored_file
from workers.synthesize import (
    CHUNK,
    SAMPLES,
    JoinTask,
    SynthesizeTask,
    SyntheticRecord,
    find_synthetic,
    join,
    synthesize,
)
from workers.tasks import TensorSource


def run(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Make the images of a job, or find those that an earlier run of it has made.

    Raises:
        WorkError: the network is not finite on them, or takes images that are neither grey nor coloured.
    """
    if job.spec.recipe != "data_free":
        return job
    with clock.stage("synthesize"):
        record = find_synthetic(job.registry, job.digest) or _make(job, executor, clock)
    network, store_uri = job.staged.network, job.registry.store.uri
    if record.network is not None:
        network = network.model_copy(update={"source": TensorSource(store_uri, record.network)})
    images = CalibrationSpec(data=stored_file(store_uri, record.images), samples=record.samples, batch_size=CHUNK)
    return replace(job, observation=Observation(network, images, record.digest))


def _make(job: Job, executor: Executor, clock: StageClock) -> SyntheticRecord:
    memory_bytes, progress = job.needs["synthesize"].memory_bytes, clock.progress("synthesize")
    tasks = [
        SynthesizeTask(context=job.context, samples=min(CHUNK, SAMPLES - start), chunk=chunk)
        for chunk, start in enumerate(range(0, SAMPLES, CHUNK))
    ]
    for count, _ in enumerate(executor.map(synthesize, tasks, memory_bytes=memory_bytes), start=1):
        progress(count, len(tasks))
    joining = JoinTask(context=job.context, chunks=len(tasks))
    [(_, record)] = executor.map(join, [joining], memory_bytes=memory_bytes)
    return record
