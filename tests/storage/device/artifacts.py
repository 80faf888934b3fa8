"""Small real artifacts for the device's tests: random blobs under the digests that a real manifest names."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from storage.layout import blob_key, manifest_key, tag_key
from storage.manifest import (
    MEDIA_TYPE_BASE,
    MEDIA_TYPE_SHARD,
    Descriptor,
    LayerRecord,
    Manifest,
    ModelRecord,
    Piece,
    ShardDescriptor,
    ShardGroup,
    SizeRecord,
    canonical_json,
)
from storage.references import TagRecord
from storage.stores.blob_store import BlobStore


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def content(seed: str, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def shard(data: bytes) -> ShardDescriptor:
    return ShardDescriptor(
        digest=digest_of(data), size_bytes=len(data), media_type=MEDIA_TYPE_SHARD, codec="packed", decoded_bytes=128
    )


def build(name: str, version: int, base: bytes, groups: Sequence[Sequence[bytes]]) -> tuple[Manifest, dict[str, bytes]]:
    """Return a manifest over ``groups[g][level]`` and the blobs that it names, by digest."""
    levels = max(len(group) for group in groups)
    layers = tuple(
        LayerRecord(
            name=f"block.{g}",
            kind="linear",
            parameter=f"block.{g}.weight",
            shape=(16, 8),
            bits=(8, 6, 5, 4)[: len(group)],
            scheme="asymmetric",
            pieces=(Piece(group=g, start=0, stop=16),),
        )
        for g, group in enumerate(groups)
    )
    weights = digest_of(b"weights")
    manifest = Manifest(
        name=name,
        version=version,
        model=ModelRecord(library="timm", arch="test", kwargs={}, source_digest=weights, parameters=128 * len(groups)),
        recipe={"bits": [8, 4]},
        layers=layers,
        groups=tuple(ShardGroup(levels=tuple(shard(data) for data in group)) for group in groups),
        base=(Descriptor(digest=digest_of(base), size_bytes=len(base), media_type=MEDIA_TYPE_BASE),),
        sizes=SizeRecord(weights=128, float_bytes=512, base_bytes=len(base), level_bytes=(0,) * levels),
        tool_versions={"nestquant": "0"},
    )
    blobs = {digest_of(data): data for data in [base, *(data for group in groups for data in group)]}
    return manifest, blobs


def put(store: BlobStore, manifest: Manifest, blobs: dict[str, bytes], tag: str = "latest") -> str:
    """Write blobs, manifest and tag; return the manifest's digest."""
    for digest, data in blobs.items():
        store.put(blob_key(digest), data, mode="overwrite")
    raw = canonical_json(manifest)
    store.put(manifest_key(manifest.name, manifest.version), raw, mode="create")
    record = TagRecord(name=manifest.name, version=manifest.version, digest=digest_of(raw))
    store.put(tag_key(manifest.name, tag), canonical_json(record), mode="overwrite")
    return digest_of(raw)


def publish(
    store: BlobStore,
    name: str = "net",
    version: int = 1,
    *,
    groups: int = 3,
    levels: int = 2,
    shard_bytes: int = 50_000,
    base_bytes: int = 5_000,
    fresh: Sequence[int] = (),
) -> tuple[Manifest, dict[str, bytes]]:
    """Publish ``groups`` x ``levels`` shards. Groups in ``fresh`` get bytes of this version alone."""
    shards = [
        [content(f"{g}/{k}/{version if g in fresh else 0}", shard_bytes + 100 * g + k) for k in range(levels)]
        for g in range(groups)
    ]
    manifest, blobs = build(name, version, content(f"base/{name}", base_bytes), shards)
    put(store, manifest, blobs)
    return manifest, blobs
