"""One version in the catalogue's words: from its manifest, and what its job measured."""

from __future__ import annotations

import json
import math

from jobs.catalog.record import Layer, Level, Run, Signature, Update, Version
from jobs.measurements import LayerMeasured, Measurements
from storage.manifest import LayerRecord, Manifest, level_name
from storage.registry import Resolved
from storage.wording import printable

_MOST_WORD = 160
_MOST_TEXT = 600
_MOST_COUNT = 10**18
_MOST_NOTES = 20
# The modes of a job's report are measured by the engine that every worker has.
_ENGINE = "PyTorch"


def blobs_by_level(manifest: Manifest) -> list[dict[str, int]]:
    """Return what a device holds to run each level: digest -> bytes, each level's own and those below it."""
    sizes = {blob.digest: blob.size_bytes for blob in manifest.base}
    levels = []
    for level in range(manifest.level_count()):
        shards = (shard for group in manifest.groups for shard in group.levels[level : level + 1])
        sizes = sizes | {shard.digest: shard.size_bytes for shard in shards}
        levels.append(sizes)
    return levels


def describe(
    resolved: Resolved,
    measured: Measurements | None,
    *,
    tags: tuple[str, ...],
    signature: Signature,
    before: tuple[int, list[dict[str, int]]] | None,
    problems: tuple[str, ...],
) -> Version:
    """Return what the catalogue says of a version.

    Args:
        resolved: the version.
        measured: what its job measured.
        tags: names that point at it.
        signature: what is signed of it.
        before: number and blobs by level (`blobs_by_level`) of the version before it.
        problems: what could not be read of it.
    """
    manifest, record = resolved.manifest, resolved.manifest.model
    layers = {layer.name: layer for layer in (measured.layers if measured else ())}
    return Version(
        name=manifest.name,
        version=resolved.version,
        digest=resolved.digest,
        manifest_bytes=len(resolved.raw),
        tags=tags,
        library=word(record.library),
        arch=word(record.arch),
        parameters=_count(record.parameters),
        weights=sum(math.prod(layer.shape) for layer in manifest.layers),
        float_bytes=_count(manifest.sizes.float_bytes),
        float_top1=measured.mode(None, activations=False) if measured else None,
        levels=_levels(manifest, measured),
        layers=tuple(_layer(layer, layers.get(layer.name)) for layer in manifest.layers),
        kept_float=tuple((word(float_layer.name), text(float_layer.reason)) for float_layer in manifest.kept_float),
        runs=_runs(measured),
        update=_update(manifest, before),
        signature=signature,
        provenance=_provenance(manifest),
        engines=tuple(
            (engine.engine, engine.graph.size_bytes + engine.layout.size_bytes) for engine in manifest.engines
        ),
        notes=tuple(text(note) for note in (measured.notes[:_MOST_NOTES] if measured else ())),
        problems=problems,
    )


def word(said: str) -> str:
    """Return a stranger's name for something, short enough for a table's cell."""
    return _cut(said, _MOST_WORD)


def text(said: str) -> str:
    """Return a stranger's sentence, short enough for a page."""
    return _cut(said, _MOST_TEXT)


def _cut(said: str, most: int) -> str:
    line = printable(said[: most + 1])
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _count(number: int) -> int:
    return max(0, min(number, _MOST_COUNT))


def _levels(manifest: Manifest, measured: Measurements | None) -> tuple[Level, ...]:
    count, levels, fetched = manifest.level_count(), [], 0
    for index, sizes in enumerate(blobs_by_level(manifest)):
        total = sum(sizes.values())
        widths = sorted({layer.bits[max(0, len(layer.bits) - 1 - index)] for layer in manifest.layers})
        levels.append(
            Level(
                index=index,
                name=level_name(index, count),
                bits=f"{widths[0]}-{widths[-1]}" if len(widths) > 1 else str(widths[0]) if widths else "no",
                fetch_bytes=total,
                step_bytes=total - fetched,
                plain=measured.mode(index, activations=False) if measured else None,
                quantized=measured.mode(index, activations=True) if measured else None,
            )
        )
        fetched = total
    return tuple(levels)


def _layer(layer: LayerRecord, measured: LayerMeasured | None) -> Layer:
    fits = measured is not None and len(measured.sqnr_db) == len(layer.bits)
    return Layer(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        weights=math.prod(layer.shape),
        bits=layer.bits,
        sqnr_db=measured.sqnr_db if measured is not None and fits else (),
        damage=measured.damage if measured is not None and fits else None,
    )


def _runs(measured: Measurements | None) -> tuple[Run, ...]:
    """Each mode that was measured was run, too: over the images, in the memory that its weights took."""
    return tuple(
        Run(
            engine=_ENGINE,
            mode=word(one.mode),
            activations=one.activations,
            seconds_per_image=one.seconds / one.total if one.seconds else None,
            resident_bytes=one.resident_bytes,
            images=one.total,
        )
        for one in (measured.measured if measured else ())
    )


def _update(manifest: Manifest, before: tuple[int, list[dict[str, int]]] | None) -> Update | None:
    if before is None:
        return None
    version, sizes = before
    return Update(
        version,
        tuple(
            sum(size for digest, size in blobs.items() if digest not in sizes[min(level, len(sizes) - 1)])
            for level, blobs in enumerate(blobs_by_level(manifest))
        ),
    )


def _provenance(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    record, calibration = manifest.model, manifest.calibration
    rows = [
        ("Source weights", record.source_digest),
        ("Recipe", _json(manifest.recipe)),
        ("Network's arguments", _json(record.kwargs)),
        ("Preprocessing", _json(manifest.preprocessing) if manifest.preprocessing is not None else "the library's own"),
        ("Job", manifest.job or "not recorded"),
        ("Tools", ", ".join(f"{word(tool)} {word(version)}" for tool, version in manifest.tool_versions.items())),
        ("Published", "by a single writer, without put-if-absent" if manifest.single_writer else "by put-if-absent"),
    ]
    if calibration is not None:
        skipped = f", {calibration.skipped} skipped" if calibration.skipped else ""
        where = calibration.source_digest or "images made from the network itself"
        said = f"{calibration.samples} images{skipped}, observer {word(calibration.observer)}, {where}"
        rows.insert(2, ("Calibration", said))
    return tuple((what, text(said)) for what, said in rows)


def _json(document: object) -> str:
    return json.dumps(document, sort_keys=True, ensure_ascii=False)
