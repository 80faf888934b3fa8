"""Small whole artifacts: real shards of seeded integers, and the manifest that names them."""

from __future__ import annotations

import numpy as np

from nestquant.packing import pack
from storage.manifest import (
    MEDIA_TYPE_BASE,
    LayerRecord,
    Manifest,
    ModelRecord,
    Piece,
    ShardGroup,
    SizeRecord,
    piece_key,
)
from storage.registry import Registry
from storage.shard import IntegerTensor, build_base, build_shard
from storage.stores.blob_store import BlobStore


def integers(shape: tuple[int, ...], bits: int, seed: int) -> IntegerTensor:
    """Return bell-shaped integers within ``bits`` signed bits."""
    bound = 1 << (bits - 1)
    values = np.random.default_rng(seed).normal(0, bound / 4, shape).round().clip(-bound, bound - 1).astype(np.int8)
    return IntegerTensor(values, pack(values, bits), bits, shape)


def conv_layer(name: str, shape: tuple[int, ...], *, group: int) -> LayerRecord:
    """Return the record of a convolution, 8 over 4, that stands whole in one shard group."""
    return LayerRecord(
        name=name,
        kind="conv2d",
        parameter=f"{name}.weight",
        shape=shape,
        bits=(8, 4),
        scheme="asymmetric",
        pieces=(Piece(group=group, start=0, stop=shape[0]),),
    )


def make_draft(registry: Registry, *, name: str = "net", seed: int = 0, groups: int = 2) -> Manifest:
    """Store the blobs of an artifact of one layer a group, 8 over 4, and return its manifest, not yet published."""
    shape = (16, 8, 3, 3)
    layers, shard_groups = [], []
    for index in range(groups):
        layer, levels = f"conv{index}", []
        for level, bits in enumerate((4, 5)):
            tensor = integers(shape, bits, seed=100 * seed + 10 * index + level)
            scales = {f"{layer}[0:16]/scale": np.full(16, 0.5, np.float32)} if level == 0 else {}
            levels.append(registry.put_shard(build_shard({piece_key(layer, 0, 16, level): tensor}, scales)))
        layers.append(conv_layer(layer, shape, group=index))
        shard_groups.append(ShardGroup(levels=tuple(levels)))
    base = registry.put_blob(build_base({"fc.bias": np.arange(10, dtype=np.float32) + seed}), MEDIA_TYPE_BASE)
    weights = groups * int(np.prod(shape))
    level_bytes = tuple(sum(group.levels[level].size_bytes for group in shard_groups) for level in range(2))
    return Manifest(
        name=name,
        version=1,
        model=ModelRecord(
            library="timm", arch="tiny", kwargs={}, source_digest=f"sha256:{seed:064x}", parameters=weights + 10
        ),
        recipe={"seed": seed},
        layers=tuple(layers),
        groups=tuple(shard_groups),
        base=(base,),
        sizes=SizeRecord(weights=weights, float_bytes=4 * weights, base_bytes=base.size_bytes, level_bytes=level_bytes),
        tool_versions={"nestquant": "test"},
    )


def publish_new(store: BlobStore, *, name: str = "net", seed: int = 0) -> int:
    """Publish one version and return its number."""
    registry = Registry(store)
    return registry.publish(make_draft(registry, name=name, seed=seed)).version
