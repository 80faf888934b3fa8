"""The main job by stages: validate, stage, plan, (measure layers alone and choose their bits,) (make images,)
calibrate, reconstruct, quantize, publish, pull back, evaluate, tag.

The driver moves names and digests; weights go from the checkpoint to a worker and from there to the store. What is
published is pulled back as a device would, and measured; with a gate in the spec, a version that falls short stays
without its tags.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.events import Event, Listener, StageClock
from jobs.result import JobResult, PullSummary, WorkSummary, layer_qualities, sizes_of, stored_bits_per_weight
from jobs.spec.job import METHOD_VERSION, JobSpec, StoreSpec
from jobs.stages.calibration import Calibrated, calibrate
from jobs.stages.evaluation import evaluate, gate_fault, measure_tasks
from jobs.stages.memory import member_need, task_needs
from jobs.stages.mixed import MixedRecord, mixed_bits
from jobs.stages.plan import Plan, make_plan
from jobs.stages.reconstruction import Reconstructed, reconstruct
from jobs.stages.sensitivity import measure_sensitivities
from jobs.stages.signing import load_keys
from jobs.stages.synthesis import make_synthetic
from jobs.stages.weights import Staged, outline, stage
from storage.capabilities import has_create_only
from storage.device import Device, StoreSource
from storage.device.errors import ContentError, GaveUp
from storage.errors import Damaged, UnsafeStore
from storage.manifest import Manifest, ModelRecord, ShardGroup, canonical_json
from storage.registry import Published, Registry
from storage.signing import sign
from storage.uri import open_store
from workers.checkpoint import fetch
from workers.errors import Need
from workers.executor import Executor
from workers.images import open_images
from workers.measure import Measured
from workers.quantize import run_bundle
from workers.scratch import scratch
from workers.sensitivity import SensitivityRecord
from workers.tasks import BaseRecord, Bundle, GroupRecord, TaskContext, UnitResult

REPORT = "job"
_TOOLS = ("nestquant-service", "torch", "numpy", "zstandard", "safetensors", "timm", "pytorchcv")


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs are checked and whose plan is made; nothing is quantized yet."""

    registry: Registry
    staged: Staged
    plan: Plan
    calibration_digest: str | None
    needs: Mapping[str, Need]
    image_bytes: int
    job: str

    @property
    def context(self) -> TaskContext:
        """Return where the job's tasks read and write."""
        return TaskContext(store_uri=self.registry.store.uri, source=self.staged.source, job=self.job)


def prepare(spec: JobSpec, executor: Executor, folder: Path, clock: StageClock) -> Prepared:
    """Check everything that can be checked before work starts, bring the weights where workers read them, and plan.

    Raises:
        SpecError, PlanError, WorkError, storage.StorageError: each naming the key, layer or file at fault.
    """
    with clock.stage("validate"):
        load_keys(spec.store.signing_keys)
        registry = Registry(open_store(spec.store.uri))
        _check_store(registry, single_writer=spec.store.single_writer)
        network = outline(spec.model)
        calibration_digest, image_bytes = _check_images(spec, folder)
    with clock.stage("stage"):
        kept_in = None if executor.same_machine else registry
        staged = stage(spec.model, spec.preprocess, network, folder, executor=executor, registry=kept_in)
    with clock.stage("plan"):
        plan = _plan(spec, staged)
    needs = task_needs(spec, staged, plan, executor, image_bytes=image_bytes)
    executor.require(max(needs.values(), key=lambda need: need.memory_bytes))
    job = spec.identity(source_digest=staged.source_digest, calibration_digest=calibration_digest)
    return Prepared(registry, staged, plan, calibration_digest, needs, image_bytes, job)


def _plan(spec: JobSpec, staged: Staged, high_bits: Mapping[str, int] | None = None) -> Plan:
    state = {name: (info.shape, info.size_bytes) for name, info in staged.tensors.items()}
    return make_plan(spec, staged.scan, staged.order, state, high_bits=high_bits)


@dataclass(frozen=True)
class Measurements:
    """What was measured before anything was quantized, and the bits that follow from it; empty where none was asked."""

    sensitivities: tuple[SensitivityRecord, ...] = ()
    mixed: MixedRecord | None = None

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Return the images that could not be read: (name, reason)."""
        return tuple(dict.fromkeys(image for record in self.sensitivities for image in record.skipped))


def measure(spec: JobSpec, prepared: Prepared, executor: Executor, clock: StageClock) -> tuple[Prepared, Measurements]:
    """Measure each layer alone where the spec asks for it, and where bits are mixed choose them and plan anew.

    Raises:
        PlanError: the target of ``quantize.mixed`` cannot be met.
        WorkError, storage.StorageError: naming the layer or file at fault.
    """
    if not spec.measures_layers:
        return prepared, Measurements()
    staged, context = prepared.staged, prepared.context
    with clock.stage("sensitivity"):
        progress = clock.progress("sensitivity")
        records = measure_sensitivities(spec, staged, prepared.plan, executor, context=context, on_done=progress)
        if spec.quantize.mixed is None:
            return prepared, Measurements(records)
        mixed = mixed_bits(spec.quantize.mixed, prepared.plan, records, prepared.registry, job=prepared.job)
    with clock.stage("plan"):
        plan = _plan(spec, staged, mixed.high_bits)
    return replace(prepared, plan=plan), Measurements(records, mixed)


@dataclass(frozen=True)
class Outcome:
    """What the stages after the plan brought."""

    measurements: Measurements
    calibrated: Calibrated
    reconstructed: Reconstructed
    results: Sequence[UnitResult]
    published: Published
    manifest: Manifest
    pull: PullSummary
    measured: tuple[Measured, ...]
    fault: str | None


def run_job(spec: JobSpec, executor: Executor, listen: Listener = lambda _: None) -> JobResult:
    """Run a job from spec to tag and return what it found.

    Running it again does only what is missing: finished units are found in the job's ledger, blobs by their digest,
    the version by its content.

    Raises:
        SpecError, PlanError, WorkError, storage.StorageError: each naming the key, layer or file at fault.
    """
    clock = StageClock(listen)
    with scratch("job", tell=lambda text: listen(Event("note", "validate", message=text))) as folder:
        prepared = prepare(spec, executor, folder, clock)
        for note in prepared.staged.notes:
            listen(Event("note", "plan", message=note))
        prepared, measurements = measure(spec, prepared, executor, clock)
        outcome = _carry_out(spec, prepared, executor, folder, clock, measurements=measurements)
    result = _result(spec, prepared, outcome, clock.seconds)
    prepared.registry.put_report(result.name, result.version, REPORT, canonical_json(result))
    return result


def _carry_out(
    spec: JobSpec,
    prepared: Prepared,
    executor: Executor,
    folder: Path,
    clock: StageClock,
    *,
    measurements: Measurements,
) -> Outcome:
    registry, staged, plan = prepared.registry, prepared.staged, prepared.plan
    gate = spec.evaluate if spec.evaluate is not None and spec.evaluate.has_gate else None
    seen_spec, seen = spec, prepared  # what the stages that look at activations read
    if spec.quantize.recipe == "data_free":
        with clock.stage("synthesize"):
            seen_spec, seen = _synthesize(spec, prepared, executor, clock)
    with clock.stage("calibrate"):
        calibrated = _calibrate(seen_spec, seen, executor, clock)
    reconstructed = Reconstructed()
    if plan.solved_layers:
        with clock.stage("reconstruct"):
            reconstructed = _reconstruct(seen_spec, seen, executor, clock)
    with clock.stage("quantize"):
        results = _quantize(prepared, executor, clock)
    with clock.stage("publish"):
        draft = _manifest(spec, seen, calibrated, reconstructed, results)
        published = registry.publish(draft, single_writer=spec.store.single_writer)
        executor.tell(published)
    with clock.stage("pull"):
        cache = folder / "device"
        manifest, pull = _pull(registry, published, cache)
        if gate is None:  # only what came back whole gets a name that devices follow
            _tag(registry, published, spec.store)
    measured: tuple[Measured, ...] = ()
    if spec.evaluate is not None:
        with clock.stage("evaluate"):
            here = cache if executor.same_machine else None
            tasks = measure_tasks(spec, spec.evaluate, staged, manifest, store_uri=registry.store.uri, cache=here)
            memory = prepared.needs["evaluate"].memory_bytes
            measured = evaluate(tasks, executor, clock.progress("evaluate"), memory_bytes=memory)
    fault = None if gate is None else gate_fault(gate, measured)
    if gate is not None and fault is None:
        _tag(registry, published, spec.store)
    return Outcome(measurements, calibrated, reconstructed, results, published, manifest, pull, measured, fault)


def _check_store(registry: Registry, *, single_writer: bool) -> None:
    """Write to the store before any work is done for it; publishing checks again."""
    if not has_create_only(registry.store) and not single_writer:
        raise UnsafeStore(
            f"{registry.store.uri}: this store ignores put-if-absent, so two publishers could overwrite each other; "
            "use another store, or say --single-writer if nobody else publishes to it"
        )


def _check_images(spec: JobSpec, folder: Path) -> tuple[str | None, int]:
    """Open every image set named in the spec, so that a wrong path costs no work; return the calibration set's
    digest, and what the largest set keeps in memory.
    """
    resident_bytes = 0
    if spec.evaluate is not None:
        images = open_images(fetch(spec.evaluate.data, folder))
        images.require_labels()
        resident_bytes = images.resident_bytes
    if spec.calibration is None:
        return None, resident_bytes
    images = open_images(fetch(spec.calibration.data, folder))
    digest = images.digest(min(spec.calibration.samples, len(images)))
    return digest, max(resident_bytes, images.resident_bytes)


def _calibrate(spec: JobSpec, prepared: Prepared, executor: Executor, clock: StageClock) -> Calibrated:
    need = prepared.needs.get("calibrate")
    return calibrate(
        spec,
        prepared.staged,
        prepared.plan,
        executor,
        digest=prepared.calibration_digest,
        memory_bytes=0 if need is None else need.memory_bytes,
        on_done=clock.progress("calibrate"),
    )


def _synthesize(spec: JobSpec, prepared: Prepared, executor: Executor, clock: StageClock) -> tuple[JobSpec, Prepared]:
    """Return the job as if its synthetic images were given, and the network that fits them its checkpoint."""
    made = make_synthetic(
        spec,
        prepared.staged,
        executor,
        registry=prepared.registry,
        context=prepared.context,
        on_done=clock.progress("synthesize"),
    )
    staged = replace(prepared.staged, source=made.source)
    seen = replace(prepared, staged=staged, calibration_digest=made.digest)
    return spec.model_copy(update={"calibration": made.calibration}), seen


def _reconstruct(spec: JobSpec, prepared: Prepared, executor: Executor, clock: StageClock) -> Reconstructed:
    assert spec.calibration is not None
    return reconstruct(
        spec,
        spec.calibration,
        prepared.staged,
        prepared.plan,
        executor,
        registry=prepared.registry,
        context=prepared.context,
        need_of=functools.partial(
            member_need, prepared.staged, prepared.plan, spec.calibration, image_bytes=prepared.image_bytes
        ),
        on_done=clock.progress("reconstruct"),
    )


def _quantize(prepared: Prepared, executor: Executor, clock: StageClock) -> list[UnitResult]:
    plan = prepared.plan
    bundles = [Bundle(context=prepared.context, units=units) for units in plan.tasks]
    total, results = len(plan.groups) + len(plan.base), list[UnitResult]()
    progress = clock.progress("quantize")
    for _, done in executor.map(run_bundle, bundles, memory_bytes=prepared.needs["quantize"].memory_bytes):
        results.extend(done)
        progress(len(results), total)
    return results


def _manifest(
    spec: JobSpec,
    prepared: Prepared,
    calibrated: Calibrated,
    reconstructed: Reconstructed,
    results: Sequence[UnitResult],
) -> Manifest:
    staged, plan = prepared.staged, prepared.plan
    groups = sorted(
        (result.record for result in results if isinstance(result.record, GroupRecord)), key=lambda record: record.index
    )
    base = sorted(
        (result.record for result in results if isinstance(result.record, BaseRecord)), key=lambda record: record.index
    )
    with_biases = {solved.layer for solved in reconstructed.layers if solved.biases}
    layers = tuple(
        layer.model_copy(update={"activation": calibrated.ranges.get(layer.name), "biases": layer.name in with_biases})
        for layer in plan.layers
    )
    float_bytes = sum(info.size_bytes for info in staged.tensors.values())
    return Manifest(
        name=spec.name,
        version=1,
        model=ModelRecord(
            library=spec.model.library,
            arch=spec.model.arch,
            kwargs=spec.model.kwargs,
            source_digest=staged.source_digest,
            parameters=staged.parameters,
        ),
        recipe={"method": METHOD_VERSION, **spec.quantize.model_dump(mode="json")},
        layers=layers,
        groups=tuple(ShardGroup(levels=record.levels) for record in groups),
        base=tuple(record.descriptor for record in base),
        kept_float=plan.kept_float,
        preprocessing=staged.preprocessing.to_record(),
        calibration=calibrated.record or reconstructed.record(prepared.calibration_digest),
        sizes=sizes_of(groups, sum(record.descriptor.size_bytes for record in base), layers, float_bytes),
        tool_versions=tool_versions(_TOOLS),
        job=prepared.job,
    )


def _tag(registry: Registry, published: Published, spec: StoreSpec) -> None:
    """Tag the version and, with keys in the spec, sign it and its tags."""
    name, version = published.name, published.version
    for tag in spec.tags:
        registry.tag(name, tag, version)
    if spec.signing_keys:
        tags = dict.fromkeys(spec.tags, version)
        sign(registry.store, name, load_keys(spec.signing_keys), versions=[version], tags=tags)


def _pull(registry: Registry, published: Published, cache: Path) -> tuple[Manifest, PullSummary]:
    """Fetch the version as a device does, part-bit first, then the upgrade.

    Raises:
        Damaged: what came back is not what was published; it is not tagged.
        storage.StorageError: the store or the disk.
    """
    device = Device(cache, StoreSource(registry.store), unsigned=True)
    try:
        moved = [device.pull(published.name, str(published.version)).received_bytes]
        manifest = device.manifest(published.name)
        moved += [device.upgrade(published.name, level).received_bytes for level in range(1, manifest.level_count())]
    except GaveUp as error:
        if not isinstance(error.__cause__, ContentError):
            raise
        raise Damaged(
            f"{published.name} version {published.version} is stored, but not tagged: pulled back, {error.__cause__}; "
            "run the job again: what is damaged is sent anew"
        ) from error
    return manifest, PullSummary(level_bytes=tuple(moved))


def _result(spec: JobSpec, prepared: Prepared, outcome: Outcome, seconds: dict[str, float]) -> JobResult:
    published, sizes = outcome.published, outcome.manifest.sizes
    skipped = [*outcome.measurements.skipped, *outcome.calibrated.skipped, *outcome.reconstructed.skipped]
    skipped += (image for one in outcome.measured for image in one.skipped)
    return JobResult(
        name=published.name,
        version=published.version,
        digest=published.digest,
        created=published.created,
        tags=() if outcome.fault else spec.store.tags,
        job=prepared.job,
        library=spec.model.library,
        arch=spec.model.arch,
        bits=spec.quantize.bits,
        sizes=sizes,
        stored_bits_per_weight=stored_bits_per_weight(sizes),
        kept_float=outcome.manifest.kept_float,
        layers=layer_qualities(outcome.manifest.layers, outcome.results, outcome.measurements.sensitivities),
        mixed=outcome.measurements.mixed,
        measured=outcome.measured,
        work=WorkSummary.of(outcome.results),
        pull=outcome.pull,
        seconds=seconds,
        skipped_images=tuple(dict.fromkeys(skipped)),
        notes=(*prepared.staged.notes, *outcome.reconstructed.notes),
        gate=outcome.fault,
    )


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution, and Python's."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
