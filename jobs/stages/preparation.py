"""Before any work: check what can be checked, bring the weights to where workers read them, and plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.errors import PlanError
from jobs.events import StageClock
from jobs.spec.job import JobSpec
from jobs.stages.code import stage_code
from jobs.stages.job import EvaluationImages, Job, Observation
from jobs.stages.labels import class_names
from jobs.stages.memory import task_needs, trial_need
from jobs.stages.plan import Plan, make_plan, protection_notes
from jobs.stages.signing import load_keys
from jobs.stages.weights import StagedModel, outline, stage
from storage.errors import UnsafeStore
from storage.registry import Registry
from storage.stores.capabilities import has_create_only
from storage.stores.uri import open_store
from workers.errors import DataError, shown
from workers.evaluate import beyond_classes
from workers.executor import Executor
from workers.inputs.files import require_room
from workers.inputs.images import ImageSet, fetch_images
from workers.trial import Trial, TrialTask, try_forward


def prepare(spec: JobSpec, executor: Executor, folder: Path, clock: StageClock) -> Job:
    """Return a job that is ready to run; nothing is quantized yet.

    Raises:
        SpecError, PlanError, WorkError, storage.StorageError: each naming the key, layer or file at fault.
    """
    with clock.stage("validate"):
        load_keys(spec.store.signing_keys)
        registry = Registry(open_store(spec.store.uri))
        _check_store(registry, single_writer=spec.store.single_writer)
        kept_in = None if executor.same_machine else registry
        code = stage_code(spec.model, folder, kept_in)
        network = outline(spec.model)
        images = _check_images(spec, folder)
    with clock.stage("stage"):
        staged = stage(spec.model, spec.preprocess, network, folder, executor=executor, registry=kept_in, code=code)
        _check_channels(spec, staged)
        if spec.forwards and not staged.trace.ran:
            staged = _try_forward(spec, staged, executor)
        if images.judging is not None:
            _check_classes(spec, staged, images.judging)
        names = class_names(spec, images.sets, folder, classes=staged.trace.classes)
    with clock.stage("plan"):
        plan = plan_of(spec, staged)
        require_room(folder, plan.stored_bytes, "The version, pulled back to be checked,")
    job = Job(
        spec=spec,
        registry=registry,
        folder=folder,
        staged=staged,
        plan=plan,
        observation=Observation(staged.network, spec.calibration, images.digest),
        image_bytes=images.resident_bytes,
        judged=images.judged,
        notes=(*_chosen_recipe(spec), *images.notes),
        class_names=names,
        digest=spec.identity(
            source_digest=staged.source_digest,
            calibration_digest=images.digest,
            code_digest=None if code is None else code.digest,
        ),
    )
    needs = task_needs(job, executor)
    executor.require(max(needs.values(), key=lambda need: need.memory_bytes))
    return replace(job, needs=needs, notes=(*job.notes, *protection_notes(plan)))


def plan_of(spec: JobSpec, staged: StagedModel, high_bits: Mapping[str, int] | None = None) -> Plan:
    """Return the plan of a staged model; ``high_bits`` were chosen layer by layer."""
    state = {name: (info.shape, info.size_bytes) for name, info in staged.tensors.items()}
    return make_plan(spec, staged.scan, staged.trace.order, state, high_bits=high_bits)


def _check_store(registry: Registry, *, single_writer: bool) -> None:
    """Write to the store before any work is done for it; publishing checks again."""
    if not has_create_only(registry.store) and not single_writer:
        raise UnsafeStore(
            f"{registry.store.uri}: this store ignores put-if-absent, so two publishers could overwrite each other; "
            "use another store, or say --single-writer if nobody else publishes to it"
        )


def _chosen_recipe(spec: JobSpec) -> tuple[str, ...]:
    """Return a line that says which recipe ``auto`` came to, and why."""
    if spec.quantize.recipe != "auto":
        return ()
    if spec.calibration is not None:
        return ("recipe: calibrated, as the job has calibration images (quantize.recipe is 'auto')",)
    return (
        "recipe: data_free, as the job has no calibration images (quantize.recipe is 'auto'); images of yours give "
        "more accurate integers, 'recipe: paper' is faster and less accurate",
    )


@dataclass(frozen=True)
class _Images:
    """What is known of the spec's image sets, by section: the calibration set's digest, the images to be judged by,
    what the largest set keeps in memory, and what people should know of how they were read.
    """

    sets: Mapping[str, ImageSet]
    digest: str | None
    judged: EvaluationImages | None
    resident_bytes: int
    notes: tuple[str, ...]

    @property
    def judging(self) -> ImageSet | None:
        """Return the evaluation set."""
        return self.sets.get("evaluate")


def _check_images(spec: JobSpec, folder: Path) -> _Images:
    """Open every image set named in the spec, so that a wrong path or label costs no work."""
    sets, digest, judged, resident_bytes, notes = dict[str, ImageSet](), None, None, 0, list[str]()
    if spec.evaluate is not None:
        sets["evaluate"] = judging = fetch_images(spec.evaluate.data, folder)
        judging.require_classes(spec.evaluate.limit)
        counting = judging.take(range(len(judging))[: spec.evaluate.limit])
        counting.check()
        judged = EvaluationImages.of(counting)
        resident_bytes = judging.resident_bytes
        notes += [f"evaluate.data: {note}" for note in (judging.labelling.reading, judging.labelling.left_out) if note]
    if spec.calibration is not None:
        sets["calibration"] = images = fetch_images(spec.calibration.data, folder)
        images.sample(spec.calibration.samples).check()
        digest = images.digest(min(spec.calibration.samples, len(images)))
        resident_bytes = max(resident_bytes, images.resident_bytes)
        notes += [f"calibration.data: {note}" for note in (images.labelling.left_out,) if note]
    return _Images(sets, digest, judged, resident_bytes, tuple(notes))


def _check_channels(spec: JobSpec, staged: StagedModel) -> None:
    """Refuse images for a network that takes none of theirs."""
    channels = staged.preprocessing.input_shape[0]
    if channels not in (1, 3) and (spec.evaluate is not None or spec.calibration is not None):
        raise PlanError(
            f"{spec.model.library} {spec.model.arch} takes inputs of {channels} channels; images have 1 or 3. Leave "
            "'evaluate' and 'calibration' out, or set model.kwargs."
        )
    if channels not in (1, 3) and spec.recipe == "data_free":
        raise PlanError(
            f"quantize.recipe {spec.quantize.recipe!r}: a job without calibration images makes its own, of 1 or 3 "
            f"channels; {spec.model.library} {spec.model.arch} takes {channels}. Say 'recipe: paper', which needs none."
        )


def _try_forward(spec: JobSpec, staged: StagedModel, executor: Executor) -> StagedModel:
    """Let a worker run a network that did not run without data, before other work: the job runs it later. Returns the
    model with what its answer tells.

    Raises:
        PlanError: it does not run on one image.
    """
    title, fault, trial = f"{spec.model.library} {spec.model.arch}", staged.trace.fault, Trial()
    if not fault:
        need = trial_need(staged)
        executor.require(need)
        ((_, trial),) = executor.map(try_forward, [TrialTask(network=staged.network)], memory_bytes=need.memory_bytes)
        fault = trial.fault
    if fault:
        recipe, *sections = spec.forwards if spec.recipe != "paper" else ("", *spec.forwards)
        changes = ["say 'quantize: {recipe: paper}'"] if recipe else []
        changes += [f"leave {shown(sections)} out"] if sections else []
        raise PlanError(
            f"{title} cannot run on one image: {fault}. The job runs it for {' and '.join(spec.forwards)}; "
            f"{' and '.join(changes)} to quantize it without, or take a network of images."
        )
    return replace(staged, trace=replace(staged.trace, classes=trial.classes, no_classes=trial.no_classes))


def _check_classes(spec: JobSpec, staged: StagedModel, images: ImageSet) -> None:
    """Refuse labels that the network's answers cannot be held against, as far as those are known before it ran."""
    assert spec.evaluate is not None, "there is nothing to be evaluated"
    classes, no_classes = staged.trace.classes, staged.trace.no_classes
    if no_classes:
        raise PlanError(
            f"evaluate: {spec.model.library} {spec.model.arch} cannot be judged by labels: {no_classes}; leave "
            "'evaluate' out, or take a network that classifies."
        )
    if classes is None:
        return
    if (images.labelling.classes or 0) > classes:
        raise DataError(
            f"{images.uri} has {images.labelling.reading}; the network has {classes} classes. Take away the "
            "folders that are no classes, or say which they are in labels.csv."
        )
    highest = max(images.require_classes(spec.evaluate.limit))
    if highest >= classes:
        raise DataError(beyond_classes(images, highest, classes))
