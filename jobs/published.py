"""What is done with a version that is published, or pulled already, without the job that made it: measure it, export it
to an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.events import Event, Listener
from jobs.stages.publishing import EXPORT_TOOLS
from jobs.versions import tool_versions
from storage.class_labels import build_labels
from storage.device import Device, StoreSource
from storage.manifest import MEDIA_TYPE_LABELS, Engine, EngineRecord, Manifest, level_name
from storage.registry import Published, Registry, Resolved
from storage.stores.uri import open_existing_store
from workers import runtime
from workers.engines.export import ExportTask, RangeImages, export_version
from workers.inputs.images import fetch_images
from workers.measure import Measured, join_ranges, measure_range
from workers.scratch import scratch


def measure_published(
    name: str,
    ref: str,
    *,
    store: str | None,
    cache: Path | None,
    data: str,
    limit: int | None,
    batch_size: int,
    listen: Listener,
) -> tuple[Manifest, tuple[Measured, ...]]:
    """Measure every mode that is there, with and without quantized activations where ranges are known.

    Args:
        name: the model's name.
        ref: tag, number or digest; a device's folder holds one version and takes no other.
        store: pull the version from here into a scratch folder, or None.
        cache: a device's folder to read offline, or None.
        data: labelled images, a path or URI.
        limit: use the first so many images.
        batch_size: images in one forward pass.
        listen: hears of progress.

    Raises:
        WorkError, storage.StorageError: what is missing or does not fit.
    """
    with scratch("evaluate", tell=lambda text: listen(Event("note", "evaluate", message=text))) as folder:
        images = fetch_images(data, folder)
        images.require_classes(limit)
        for note in (images.labelling.reading, images.labelling.left_out):
            if note:
                listen(Event("note", "evaluate", message=note))
        if cache is None:
            assert store is not None
            device = Device(folder / "cache", StoreSource(open_existing_store(store)), unsigned=True)
            device.pull(name, ref)
            device.upgrade(name)
        else:
            device = Device(cache)
        manifest = device.manifest(name)
        levels = device.levels(name)
        ranges = any(layer.activation is not None for layer in manifest.layers)
        modes = [(level, quantized) for quantized in ((False, True) if ranges else (False,)) for level in levels]
        model = runtime.load(manifest, device.blob_path)
        measured = []
        listen(Event("started", "evaluate"))
        for index, (level, quantized) in enumerate(modes):
            listen(Event("progress", "evaluate", done=index, total=len(modes)))
            model.to_level(level)
            whole = measure_range(
                model,
                images,
                model.preprocessing,
                activations=quantized,
                name=f"{manifest.name} version {manifest.version}",
                batch_size=batch_size,
                start=0,
                stop=min(limit or len(images), len(images)),
            )
            mode = level_name(level, manifest.level_count())
            measured.append(join_ranges([whole], mode=mode, level=level, activations=quantized, data=data)[0])
        listen(Event("finished", "evaluate"))
    return manifest, tuple(measured)


@dataclass(frozen=True)
class ExportedVersion:
    """A version published once more, and what an engine runs it from."""

    published: Published
    engine: EngineRecord


def export_published(
    registry: Registry,
    version: Resolved,
    engine: Engine,
    *,
    images: RangeImages | None,
    labels: tuple[str, ...] | None = None,
    tags: tuple[str, ...] = (),
) -> ExportedVersion:
    """Publish a version once more, with what an engine runs it from; its shards are those that are there.

    Args:
        registry: the version's store.
        version: which version.
        engine: which engine; what the version holds for it already is made anew.
        images: tell the ranges that the manifest does not hold; None leaves what needs them float.
        labels: names of the classes (`storage.class_labels`); None leaves them as they are.
        tags: get the new version.

    Raises:
        WorkError, storage.StorageError: the engine cannot take a layer, or a blob is not there.
    """
    manifest = version.manifest
    record = export_version(ExportTask(store_uri=registry.store.uri, engine=engine, manifest=manifest, images=images))
    others = tuple(other for other in manifest.engines if other.engine != engine)
    tools = {tool: number for tool, number in tool_versions(EXPORT_TOOLS).items() if tool != "python"}
    draft = manifest.with_additions(
        engines=(*others, record),
        labels=manifest.labels if labels is None else registry.put_blob(build_labels(labels), MEDIA_TYPE_LABELS),
    ).model_copy(update={"tool_versions": manifest.tool_versions | tools})
    published = registry.publish(draft, single_writer=manifest.single_writer)
    for tag in tags:
        registry.tag(manifest.name, tag, published.version)
    return ExportedVersion(published, record)
