"""Deltas between versions: what a device downloads in the place of shards when a model was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from storage.delta import canonical_bytes, describe, make_delta
from storage.device.ways import chains
from storage.errors import StorageError
from storage.manifest import (
    MAX_DELTAS_A_BLOB,
    MEDIA_TYPE_DELTA,
    CanonicalForm,
    DeltaRecord,
    Descriptor,
    Manifest,
    ShardDescriptor,
)
from storage.registry import Published, Registry, Resolved

WORTH = 0.8
"""A delta longer than this share of what it makes is not published."""


@dataclass(frozen=True, slots=True)
class LevelBytes:
    """What a device at an earlier version moves of one level: ``whole_bytes`` without deltas, ``update_bytes`` with.

    ``level``: None for what all levels share. Blobs that both versions have count in neither.
    """

    source: int
    level: int | None
    whole_bytes: int
    update_bytes: int


@dataclass(frozen=True, slots=True)
class Update:
    """A version published once more with deltas; ``published`` is None where none is worth its bytes."""

    published: Published | None
    levels: tuple[LevelBytes, ...]
    deltas: int
    delta_bytes: int


def publish_deltas(
    registry: Registry, target: Resolved, sources: Sequence[Resolved], *, tags: Sequence[str] = ()
) -> Update:
    """Publish a version once more, with deltas from earlier ones; its shards are those that are there.

    Args:
        registry: the store of all of them.
        target: the version that devices shall come to.
        sources: the versions that they are at.
        tags: get the new version.

    Raises:
        storage.StorageError: a blob is not there or damaged, or the store refuses.
    """
    draft = with_deltas(registry, target.manifest, sources)
    levels = tuple(row for source in sources for row in _level_bytes(draft, source))
    added = [delta.descriptor for delta in draft.deltas if delta not in target.manifest.deltas]
    if not added:
        return Update(None, levels, 0, 0)
    published = registry.publish(draft, single_writer=target.manifest.single_writer)
    for tag in tags:
        registry.tag(draft.name, tag, published.version)
    return Update(published, levels, len(added), sum(blob.size_bytes for blob in added))


def with_deltas(registry: Registry, target: Manifest, sources: Iterable[Resolved]) -> Manifest:
    """Return a manifest with deltas from earlier versions, stored; those that lead on to them come along.

    A delta that is not at least a fifth shorter than what it makes is left out, and so is a chain of them.
    """
    sources = tuple(sources)
    pairs = {
        (old.digest, new.digest): (old, new)
        for source in sources
        for old, new in paired(source.manifest, target)
        if old.digest != new.digest and old.media_type == new.media_type
    }

    @lru_cache(maxsize=2)
    def canonical(blob: Descriptor) -> bytearray:
        return canonical_bytes(registry.get_blob(blob), blob.media_type)

    def make(pair: tuple[Descriptor, Descriptor]) -> DeltaRecord | None:
        old, new = pair
        delta = make_delta(canonical(old), canonical(new))
        if delta is None or len(delta) > WORTH * new.size_bytes:
            return None
        return DeltaRecord(of=new.digest, source=old.digest, descriptor=registry.put_blob(delta, MEDIA_TYPE_DELTA))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fresh = [delta for delta in pool.map(make, pairs.values()) if delta is not None]
    earlier = [*target.deltas, *(delta for source in sources for delta in source.manifest.deltas)]
    deltas = _useful(registry, target, [*fresh, *earlier])
    results = {delta.of for delta in deltas}
    shards = [
        shard
        for group in target.groups
        for shard in group.levels
        if shard.digest in results and isinstance(shard, ShardDescriptor)
    ]
    forms: Mapping[str, CanonicalForm] = {shard.digest: describe(canonical(shard)) for shard in shards}
    return target.with_deltas(deltas, forms)


def paired(old: Manifest, new: Manifest) -> list[tuple[Descriptor, Descriptor]]:
    """Return the blobs that stand in the same place of two versions: base by base, group by group, level by level."""
    shards = [
        pair
        for before, after in zip(old.groups, new.groups, strict=False)
        for pair in zip(before.levels, after.levels, strict=False)
    ]
    return [*zip(old.base, new.base, strict=False), *shards]


def _useful(registry: Registry, target: Manifest, deltas: Iterable[DeltaRecord]) -> tuple[DeltaRecord, ...]:
    """Return those deltas, each once, that stand in a chain to a blob of the version which is worth its bytes."""
    there = {(delta.of, delta.source): delta for delta in reversed(list(deltas))}
    ordered = list(reversed(there.values()))
    useful: dict[tuple[str, str], DeltaRecord] = {}
    for blob in target.descriptors():
        for chain in chains(ordered, blob.digest):
            if sum(step.descriptor.size_bytes for step in chain) <= WORTH * blob.size_bytes:
                useful |= {(step.of, step.source): step for step in chain}
    counts: dict[str, int] = {}
    result = []
    for delta in useful.values():
        counts[delta.of] = counts.get(delta.of, 0) + 1
        if counts[delta.of] <= MAX_DELTAS_A_BLOB and _stands(registry, delta.descriptor):
            result.append(delta)
    return tuple(result)


def _stands(registry: Registry, blob: Descriptor) -> bool:
    """Tell whether an earlier version's delta is still in the store: that version may have been deleted."""
    try:
        registry.check_blobs([blob])
    except StorageError:
        return False
    return True


def _level_bytes(draft: Manifest, source: Resolved) -> list[LevelBytes]:
    earlier = {blob.digest for blob in source.manifest.descriptors()}
    levels: dict[int | None, list[Descriptor]] = {None: [*draft.shared_blobs()]}
    for level in range(draft.level_count()):
        levels[level] = [group.levels[level] for group in draft.groups if level < len(group.levels)]
    rows = []
    for at, blobs in levels.items():
        missing = [blob for blob in blobs if blob.digest not in earlier]
        update = [min([blob.size_bytes, *_chain_bytes(draft, blob, earlier)]) for blob in missing]
        rows.append(LevelBytes(source.version, at, sum(blob.size_bytes for blob in missing), sum(update)))
    return rows


def _chain_bytes(draft: Manifest, blob: Descriptor, earlier: set[str]) -> list[int]:
    return [
        sum(step.descriptor.size_bytes for step in chain)
        for chain in chains(draft.deltas, blob.digest)
        if chain[0].source in earlier
    ]
