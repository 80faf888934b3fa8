"""What each layer loses: measured for a spec before anything is quantized, or as a published version's job told."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from jobs.events import Event, Listener, StageClock
from jobs.result import JobResult, LayerQuality, layer_damage
from jobs.spec.job import AnalysisSpec, JobSpec
from jobs.stages.preparation import prepare
from jobs.stages.sensitivity import measure_layers
from storage.errors import NotFound
from storage.layout import JOB_REPORT
from storage.manifest import Record
from storage.registry import Registry
from workers.errors import WorkError
from workers.executor import Executor
from workers.scratch import scratch


class Analysis(Record):
    """Layers in execution order; of a spec one row for each layer and width.

    ``version`` is None for a spec: there ``level_bytes`` are those of a level-0 shard that holds the layer alone, and
    figures those of the layer quantized by itself, behind float layers.
    """

    name: str
    library: str
    arch: str
    version: int | None
    layers: tuple[LayerQuality, ...]
    skipped_images: tuple[tuple[str, str], ...] = ()


def analyze_spec(
    spec: JobSpec,
    executor: Executor,
    listen: Listener = lambda _: None,
    *,
    more_bits: Sequence[int] = (),
    samples: int | None = None,
) -> Analysis:
    """Measure every layer alone, at the widths that it may get and at ``more_bits``; publish nothing.

    Records go to the ledger of the spec's job, which does not measure again what it finds there.

    Raises:
        SpecError, PlanError, WorkError, storage.StorageError: each naming the key, layer or file at fault.
    """
    if not spec.measures_layers:  # so that a task's memory is checked before work starts
        spec = spec.model_copy(update={"analysis": AnalysisSpec()})
    clock = StageClock(listen)
    with scratch("analyze", tell=lambda text: listen(Event("note", "validate", message=text))) as folder:
        job = prepare(spec, executor, folder, clock)
        records = measure_layers(job, executor, clock, more_bits=more_bits, samples=samples)
    layers = tuple(
        LayerQuality(
            name=layer.layer,
            bits=damage.bits,
            weights=layer.weights,
            sqnr_db=damage.sqnr_db,
            flips=damage.flips,
            level_bytes=(damage.shard_bytes,),
            damage=layer_damage(record, damage.bits),
        )
        for layer, record in zip(job.plan.whole_layers, records, strict=True)
        for damage in record.damages
    )
    skipped = dict.fromkeys(image for record in records for image in record.skipped)
    return Analysis(
        name=spec.name,
        library=spec.model.library,
        arch=spec.model.arch,
        version=None,
        layers=layers,
        skipped_images=tuple(skipped),
    )


def analyze_version(registry: Registry, name: str, ref: str) -> Analysis:
    """Return what the job of a version reported of its layers.

    Raises:
        storage.NotFound: there is no such version.
        WorkError: the version has no report, or one of another release.
    """
    version = registry.resolve(name, ref).version
    try:
        result = JobResult.model_validate_json(registry.get_report(name, version, JOB_REPORT))
    except NotFound as error:
        raise WorkError(f"{name} version {version} has no report of its job; give the job's spec.") from error
    except ValidationError as error:
        raise WorkError(
            f"{name} version {version}: its report is from another release ({error.error_count()} faults); "
            "give the job's spec."
        ) from error
    return Analysis(
        name=name,
        library=result.library,
        arch=result.arch,
        version=version,
        layers=result.layers,
        skipped_images=result.skipped_images,
    )
