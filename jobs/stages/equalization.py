"""The stage ``equalize`` of the recipe ``calibrated``: the network with the channels of its activations closer in size.

What comes out takes the checkpoint's place in every stage that solves and publishes; the float network that is measured
stays the user's.
"""

from __future__ import annotations

from dataclasses import replace

from jobs.events import StageClock
from jobs.stages.job import Job
from workers.equalize import EqualizeTask, equalize_network, find_equalized
from workers.executor import Executor
from workers.tasks import TensorSource


def run(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Equalize the network of a job that quantizes activations, or find what an earlier run of it has made.

    Raises:
        WorkError: the images cannot be read, or the network does not run on them.
    """
    images = job.observation.images
    if not job.spec.effective_quantize.equalizes or images is None:
        return job
    with clock.stage("equalize"):
        record = find_equalized(job.registry, job.digest)
        if record is None:
            task = EqualizeTask(
                context=job.context, data=images.data, samples=images.samples, batch_size=images.batch_size
            )
            need = job.needs["equalize"]
            ((_, record),) = executor.map(equalize_network, [task], memory_bytes=need.memory_bytes)
    if record.network is None:
        return job
    source = TensorSource(job.registry.store.uri, record.network)
    network = job.staged.network.model_copy(update={"source": source})
    observation = replace(job.observation, network=network)
    return replace(job, observation=observation, network=network, equalized=record.sites)
