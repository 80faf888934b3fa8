"""The stage ``quantize``: every unit of the plan on workers, each stored by whoever did it."""

from __future__ import annotations

from dataclasses import replace

from jobs.events import StageClock
from jobs.stages.job import Job
from workers.executor import Executor
from workers.quantize import run_bundle
from workers.tasks import Bundle, UnitResult


def run(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Quantize, pack and store; units that an earlier run of the job has done are found in its ledger.

    Raises:
        WorkError, storage.StorageError: naming the layer or key at fault.
    """
    with clock.stage("quantize"):
        plan, progress = job.plan, clock.progress("quantize")
        bundles = [Bundle(context=job.context, units=units) for units in plan.tasks]
        results = list[UnitResult]()
        for _, finished in executor.map(run_bundle, bundles, memory_bytes=job.needs["quantize"].memory_bytes):
            results.extend(finished)
            progress(len(results), len(plan.groups) + len(plan.base))
    return replace(job, results=results)
