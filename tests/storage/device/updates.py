"""A model that is trained on: versions of real shards in which a few integers move, and the deltas between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from jobs.updates import with_deltas
from nestquant.packing import pack
from storage.delta import canonical_bytes
from storage.layout import blob_key
from storage.manifest import (
    MEDIA_TYPE_BASE,
    MEDIA_TYPE_SHARD,
    Manifest,
    ModelRecord,
    ShardDescriptor,
    ShardGroup,
    SizeRecord,
    piece_key,
)
from storage.registry import Registry
from storage.shard import IntegerTensor, build_base, build_shard, read_shard
from storage.stores.blob_store import BlobStore
from storage.tensor_file import save_tensors
from tests.storage.artifacts import conv_layer


def draft(
    registry: Registry, step: int, *, groups: int = 2, rows: int = 32, level: int | None = None, share: float = 0.01
) -> Manifest:
    """Store the blobs of the model after ``step`` further trainings, and return its manifest.

    ``level``: compress frames at this level of zstd, as another release of it might.
    """
    shape = (rows, 16, 3, 3)
    layers, shard_groups = [], []
    for group in range(groups):
        layer, levels = f"conv{group}", []
        for k, bits in enumerate((4, 5)):
            values = _trained(shape, bits, seed=10 * group + k, step=step, share=share)
            tensors = {f"{layer}[0:{rows}]/scale": np.full(rows, 0.5, np.float32)} if k == 0 else {}
            integers = {piece_key(layer, 0, rows, k): IntegerTensor(values, pack(values, bits), bits, shape)}
            shard = build_shard(integers, tensors)
            blob = registry.put_shard(shard)
            if level is not None:
                data = recompressed(shard.data, level)
                raw = registry.put_blob(data, MEDIA_TYPE_SHARD)
                blob = ShardDescriptor(**raw.model_dump(), codec="zstd", decoded_bytes=blob.decoded_bytes)
            levels.append(blob)
        layers.append(conv_layer(layer, shape, group=group))
        shard_groups.append(ShardGroup(levels=tuple(levels)))
    bias = np.random.default_rng(0).normal(size=500).astype(np.float32)
    bias[: 2 * step] += 1
    base = registry.put_blob(build_base({"fc.bias": bias}), MEDIA_TYPE_BASE)
    weights = groups * int(np.prod(shape))
    return Manifest(
        name="net",
        version=1,
        model=ModelRecord(
            library="timm", arch="tiny", kwargs={}, source_digest=f"sha256:{step:064x}", parameters=weights
        ),
        recipe={"step": step},
        layers=tuple(layers),
        groups=tuple(shard_groups),
        base=(base,),
        sizes=SizeRecord(weights=weights, float_bytes=4 * weights, base_bytes=base.size_bytes, level_bytes=(0, 0)),
        tool_versions={"nestquant": "test"},
    )


def publish(store: BlobStore, step: int, *, sources: tuple[int, ...] = (), **options: Any) -> Manifest:
    """Publish the model after ``step`` trainings, with deltas from earlier versions; return its manifest as stored."""
    registry = Registry(store)
    manifest = draft(registry, step, **options)
    manifest = with_deltas(registry, manifest, [registry.resolve("net", source) for source in sources])
    version = registry.publish(manifest).version
    registry.tag("net", "latest", version)
    return registry.resolve("net", version).manifest


def recompressed(data: bytes, level: int) -> bytes:
    """Return a shard of the same content whose frames are of another level."""
    shard = read_shard(data)
    compressor = zstandard.ZstdCompressor(level=level)
    (key, stored), *_ = shard.integers.items()
    count = int(np.prod(stored.shape))
    frame = compressor.compress(shard.payload(key, count=count).tobytes())
    index = (
        zstandard.ZstdDecompressor()
        .decompress(_section(data, "index"))
        .replace(f",{stored.payload.size},".encode(), f",{len(frame)},".encode(), 1)
    )
    sections = {"index": compressor.compress(index), "integers": frame, "tensors": _section(data, "tensors")}
    arrays = {name: np.frombuffer(section, np.uint8) for name, section in sections.items()}
    return save_tensors(arrays, {"codec": "zstd", "format": "nestquant.shard.v1"})


def keep_canonical(store: BlobStore, cache: Path, manifest: Manifest) -> int:
    """Put the canonical form into the place of each shard in a device's cache, as a device whose zstd cannot make the
    publisher's bytes keeps it; return how many.
    """
    count = 0
    for shard in (shard for group in manifest.groups for shard in group.levels):
        whole = cache / blob_key(shard.digest)
        if isinstance(shard, ShardDescriptor) and shard.canonical is not None and whole.exists():
            form = cache / blob_key(shard.canonical.digest)
            form.parent.mkdir(exist_ok=True)
            form.write_bytes(canonical_bytes(Registry(store).get_blob(shard), shard.media_type))
            whole.unlink()
            count += 1
    return count


def _section(data: bytes, name: str) -> bytes:
    from safetensors.numpy import load

    return load(data)[name].tobytes()


def _trained(shape: tuple[int, ...], bits: int, *, seed: int, step: int, share: float) -> np.ndarray:
    bound = 1 << (bits - 1)
    random = np.random.default_rng(seed)
    values = random.normal(0, bound / 4, shape).round()
    for _ in range(step):
        values += random.choice([-1, 1], shape) * (random.random(shape) < share)
    return values.clip(-bound, bound - 1).astype(np.int8)
