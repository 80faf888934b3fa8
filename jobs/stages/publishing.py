"""The stages ``publish`` and ``pull``: the manifest goes in, the version comes back as a device gets it, and only then
does it get the tags that devices follow.
"""

from __future__ import annotations

from dataclasses import replace

from jobs.events import StageClock
from jobs.result import PullSummary, sizes_of
from jobs.spec.job import METHOD_VERSIONS
from jobs.stages import labels
from jobs.stages.job import Job, PulledVersion
from jobs.stages.signing import load_keys
from jobs.versions import tool_versions
from storage.device import Device, StoreSource
from storage.device.errors import ContentError, GaveUp
from storage.errors import Damaged
from storage.manifest import Manifest, ModelRecord, ShardGroup
from storage.signing.metadata import sign
from workers.equalize import equalized_recipe
from workers.errors import shown
from workers.executor import Executor
from workers.tasks import BaseRecord, GroupRecord

EXPORT_TOOLS = ("onnx", "onnxscript", "onnxruntime")
TOOLS = ("nestquant-service", "torch", "numpy", "zstandard", "safetensors", "timm", "pytorchcv")


def publish(job: Job, executor: Executor, clock: StageClock) -> Job:
    """Put the manifest under the next number, or find that the newest version is the same already.

    Raises:
        storage.StorageError: a blob is missing or damaged, or the store refuses.
    """
    with clock.stage("publish"):
        job = labels.put(job)
        published = job.registry.publish(draft_manifest(job), single_writer=job.spec.store.single_writer)
        executor.tell(published)
    return replace(job, published=published)


def pull_back(job: Job, _: Executor, clock: StageClock) -> Job:
    """Fetch the version as a device does, part-bit first, then the upgrade.

    Raises:
        Damaged: what came back is not what was published.
        storage.StorageError: the store or the disk.
    """
    published, cache = job.version, job.folder / "device"
    device = Device(cache, StoreSource(job.registry.store), unsigned=True)
    with clock.stage("pull"):
        try:
            moved = [device.pull(published.name, str(published.version)).received_bytes]
            manifest = device.manifest(published.name)
            moved += [device.upgrade(published.name, at).received_bytes for at in range(1, manifest.level_count())]
        except GaveUp as error:
            if not isinstance(error.__cause__, ContentError):
                raise
            raise Damaged(
                f"{published.name} version {published.version} is stored, but not tagged: pulled back, "
                f"{error.__cause__}; run the job again: what is damaged is sent anew"
            ) from error
    return replace(job, pulled=PulledVersion(manifest, PullSummary(level_bytes=tuple(moved)), cache))


def tag(job: Job, _: Executor, __: StageClock) -> Job:
    """Tag the version and, with keys in the spec, sign it and its tags; one that falls short of the gate stays without.

    A tag that points at a later version already stays there: two jobs may end in another order than they began.

    Raises:
        storage.StorageError: the store refuses, or a key cannot be used.
    """
    if job.fault is not None:
        return job
    published, store = job.version, job.spec.store
    entries = [job.registry.tag_forward(published.name, name, published.version) for name in store.tags]
    moves = [entry for entry in entries if entry is not None]
    moved = [entry.tag for entry in moves]
    if store.signing_keys:
        sign(
            job.registry.store,
            published.name,
            load_keys(store.signing_keys),
            versions=[published.version],
            moves=moves,
            backwards="skip",
        )
    stayed = [name for name in store.tags if name not in moved]
    notes = (f"Tag {shown(stayed)} stays where it is, at a later version.",) if stayed else ()
    return replace(job, tags=tuple(moved), notes=(*job.notes, *notes))


def model_record(job: Job) -> ModelRecord:
    """Return what is needed to build the job's network again."""
    model, staged = job.spec.model, job.staged
    return ModelRecord(
        library=model.library,
        arch=model.arch,
        kwargs=model.kwargs,
        source_digest=staged.source_digest,
        parameters=staged.parameters,
    )


def draft_manifest(job: Job) -> Manifest:
    """Return the manifest of what was made; its number is given out by the registry."""
    spec, staged, plan = job.spec, job.staged, job.plan
    groups = sorted((one.record for one in job.results if isinstance(one.record, GroupRecord)), key=lambda r: r.index)
    base = sorted((one.record for one in job.results if isinstance(one.record, BaseRecord)), key=lambda r: r.index)
    with_biases = {solved.layer for solved in job.reconstruction.layers if solved.biases}
    ranges = job.activations.ranges
    layers = tuple(
        layer.model_copy(update={"activation": ranges.get(layer.name), "biases": layer.name in with_biases})
        for layer in plan.layers
    )
    float_bytes = sum(info.size_bytes for info in staged.tensors.values())
    return Manifest(
        name=spec.name,
        version=1,
        model=model_record(job),
        recipe={
            "method": METHOD_VERSIONS[spec.recipe],
            **spec.effective_quantize.model_dump(mode="json"),
            **equalized_recipe(job.equalized),
        },
        layers=layers,
        groups=tuple(ShardGroup(levels=record.levels) for record in groups),
        base=tuple(record.descriptor for record in base),
        kept_float=plan.kept_float,
        preprocessing=staged.preprocessing.to_record(),
        calibration=job.activations.record or job.reconstruction.record(job.observation.digest),
        sizes=sizes_of(groups, sum(record.descriptor.size_bytes for record in base), layers, float_bytes),
        tool_versions=tool_versions((*TOOLS, *EXPORT_TOOLS) if job.engines else TOOLS),
        job=job.digest,
    ).with_additions(engines=job.engines, labels=job.labels)
