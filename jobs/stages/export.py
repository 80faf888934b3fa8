"""The stages around ``export``: what an engine cannot do is found before work; its graph is made once layers have
integers.
"""

from __future__ import annotations

from dataclasses import replace

from jobs.events import StageClock
from jobs.spec.quantize import ActivationSpec
from jobs.stages.job import Job, Observation
from jobs.stages.publishing import draft_manifest, model_record
from workers.engines.export import CheckTask, ExportTask, RangeImages, check_export, export_version
from workers.executor import Executor


def check(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Let a worker trace the network for every engine of the spec, and look for its layers.

    Raises:
        WorkError: the engine cannot take the network, or a layer, which it names.
    """
    if job.spec.export is None:
        return job
    with clock.stage("trace"):
        model, preprocessing = model_record(job), job.staged.preprocessing.to_record()
        solved = {piece.layer for piece in job.plan.solved_layers}
        layers = tuple(layer.model_copy(update={"biases": layer.name in solved}) for layer in job.plan.layers)
        tasks = [
            CheckTask(
                engine=engine, model=model, layers=layers, preprocessing=preprocessing, code=job.staged.network.code
            )
            for engine in job.spec.export.engines
        ]
        for _ in executor.map(check_export, tasks, memory_bytes=job.needs["export"].memory_bytes):
            pass
    return job


def run(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Let a worker make what each engine runs the version from.

    Raises:
        WorkError, storage.StorageError: naming the layer or key at fault.
    """
    if job.spec.export is None:
        return job
    with clock.stage("export"):
        draft = draft_manifest(job)
        images = range_images(job.spec.quantize.activations, job.observation)
        tasks = [
            ExportTask(
                store_uri=job.registry.store.uri,
                engine=engine,
                manifest=draft,
                images=images,
                code=job.staged.network.code,
            )
            for engine in job.spec.export.engines
        ]
        records = dict(executor.map(export_version, tasks, memory_bytes=job.needs["export"].memory_bytes))
    return replace(job, engines=tuple(records[index] for index in sorted(records)))


def range_images(activations: ActivationSpec | None, observation: Observation) -> RangeImages | None:
    """Return the images that tell further ranges, read as the spec's observer reads them; None where there are none."""
    images = observation.images
    if activations is None or images is None or activations.observer == "sigma":
        return None
    return RangeImages(
        data=images.data,
        samples=images.samples,
        batch_size=images.batch_size,
        observer=activations.observer,
        percentile=activations.percentile,
    )
