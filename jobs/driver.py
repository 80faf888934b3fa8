"""The main job: one stage after the other, each a function of ``jobs.stages``.

The driver moves names and digests; weights go from the checkpoint to a worker and from there to the store. What is
published is pulled back as a device would, and measured; only what came back whole, and meets the gate where the spec
has one, gets its tags.
"""

from __future__ import annotations

from jobs.events import Event, Listener, StageClock
from jobs.result import JobResult, WorkSummary, layer_qualities, stored_bits_per_weight
from jobs.spec.job import JobSpec
from jobs.stages import (
    calibration,
    equalization,
    evaluation,
    export,
    publishing,
    quantization,
    reconstruction,
    sensitivity,
    synthesis,
)
from jobs.stages.job import Job, Stage
from jobs.stages.preparation import prepare
from storage.layout import JOB_REPORT
from storage.manifest import canonical_json
from workers.executor import Executor
from workers.scratch import scratch

STAGES: tuple[Stage, ...] = (
    export.check,
    sensitivity.run,
    synthesis.run,
    equalization.run,
    calibration.run,
    reconstruction.run,
    quantization.run,
    export.run,
    publishing.publish,
    publishing.pull_back,
    evaluation.run,
    publishing.tag,
)


def run_job(spec: JobSpec, executor: Executor, listen: Listener = lambda _: None) -> JobResult:
    """Run a job from spec to tag and return what it found.

    Running it again does only what is missing: finished units are found in the job's ledger, blobs by their digest,
    the version by its content.

    Raises:
        SpecError, PlanError, WorkError, storage.StorageError: each naming the key, layer or file at fault.
    """
    clock = StageClock(listen)
    with scratch("job", tell=lambda text: listen(Event("note", "validate", message=text))) as folder:
        job = prepare(spec, executor, folder, clock)
        for note in (*job.notes, *job.staged.notes):
            listen(Event("note", "plan", message=note))
        for run in STAGES:
            job = run(job, executor, clock)
    result = job_result(job, clock.seconds)
    job.registry.put_report(result.name, result.version, JOB_REPORT, canonical_json(result))
    return result


def job_result(job: Job, seconds: dict[str, float]) -> JobResult:
    """Return what a finished job has to say; ``seconds`` by stage."""
    assert job.pulled is not None, "nothing was pulled back yet"
    spec, published, manifest = job.spec, job.version, job.pulled.manifest
    return JobResult(
        name=published.name,
        version=published.version,
        digest=published.digest,
        created=published.created,
        tags=job.tags,
        job=job.digest,
        library=spec.model.library,
        arch=spec.model.arch,
        bits=spec.quantize.bits,
        sizes=manifest.sizes,
        stored_bits_per_weight=stored_bits_per_weight(manifest.sizes),
        kept_float=manifest.kept_float,
        layers=layer_qualities(manifest.layers, job.results, job.sensitivities),
        mixed=job.mixed,
        measured=job.measured,
        work=WorkSummary.of(job.results),
        pull=job.pulled.summary,
        seconds=seconds,
        skipped_images=job.skipped_images,
        notes=(*job.staged.notes, *job.reconstruction.notes, *job.notes),
        gate=job.fault,
    )
