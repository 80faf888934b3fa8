"""The nested model that a user holds: a network that runs part-bit or full-bit, and where its levels come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from jobs.api.blobs import StoreBlobs, open_bundle
from nestquant.nested_weight import Residency
from storage.device.bundle import write_bundle
from storage.layout import blob_key, manifest_key
from storage.manifest import Manifest, canonical_json
from storage.registry import Published, Registry
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from workers import runtime


class NestedModel(nn.Module):
    """A network with nested weights. Call it as the float network was called.

    ``level`` is the level that runs: 0 is part-bit, ``levels[-1]`` full-bit. ``page_out`` frees the memory of the low
    parts, ``page_in`` brings them back from where they lie: the file, store or cache that the model was loaded from; a
    model that was quantized just now keeps its encoded levels in memory until ``save`` has written them.

    Attributes:
        network: the network itself; its quantized layers are `nestquant.modules.NestedLayer`.
        notes: lines for people, such as which layers were rounded without data and why.
    """

    network: nn.Module

    def __init__(self, model: runtime.NestedModel, *, notes: Sequence[str] = ()) -> None:
        super().__init__()
        self.network = model.network
        self.notes = tuple(notes)
        self._model = model
        self._level: int | None = None
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network at the active level."""
        return self.network(*args, **kwargs)

    @property
    def manifest(self) -> Manifest:
        """What the version consists of: layers, shards, sizes."""
        return self._model.manifest

    @property
    def levels(self) -> tuple[int, ...]:
        """All levels that the model has, from part-bit to full-bit."""
        return tuple(range(self.manifest.level_count()))

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of the weights at each level, in the order of ``levels``: ``(4, 8)``."""
        return tuple(reversed(self.manifest.recipe["bits"]))

    @property
    def paged_in(self) -> tuple[int, ...]:
        """The levels that are in memory."""
        return tuple(range(self._model.level + 1))

    @property
    def level(self) -> int:
        """The level that runs."""
        return self._model.level if self._level is None else self._level

    def page_in(self, level: int | None = None) -> None:
        """Bring levels into memory up to ``level`` (default: all) and run at the highest.

        Whatever goes wrong, the model runs on as it did.

        Raises:
            ValueError: there is no such level.
            WorkError, storage.StorageError: a shard is not there, or damaged.
        """
        top = self._checked(self.levels[-1] if level is None else level)
        if top > self._model.level:
            self._model.upgrade(top)
        self._run(None)

    def page_out(self, level: int = 0) -> None:
        """Drop the levels above ``level`` from memory, and run at it.

        Raises:
            ValueError: there is no such level.
        """
        self._model.downgrade(self._checked(level))
        self._run(None)

    def set_level(self, level: int) -> None:
        """Run at ``level``: it is paged in where it is not in memory, and nothing is dropped.

        Raises:
            ValueError: there is no such level.
            WorkError, storage.StorageError: a shard is not there, or damaged.
        """
        if self._checked(level) > self._model.level:
            self._model.upgrade(level)
        self._run(level)

    def set_residency(self, residency: Residency) -> None:
        """Keep weights ``packed`` (least memory, unpacked on each use) or ``expanded`` beside them (fast)."""
        self._model.set_residency(residency)

    def resident_bytes(self) -> int:
        """Return the bytes of every parameter and buffer in memory."""
        return self._model.resident_bytes()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all levels into one file, which ``nestquant.load`` and ``nestquant pull --from`` read.

        The file gets its name when it is whole. From then on the low parts are paged in from it, and no longer kept
        encoded in memory. It holds no code: loading takes a float model of the same architecture.

        Raises:
            storage.StorageError: the file cannot be written, or what the model was loaded from is damaged.
        """
        where = Path(path)
        write_bundle(self._as_store(), self.manifest.name, str(self.manifest.version), where, level=None)
        if isinstance(self._model.blobs, StoreBlobs) and isinstance(self._model.blobs.registry.store, MemoryStore):
            _, self._model.blobs = open_bundle(where)

    def publish(self, name: str, store: str, *, tags: Sequence[str] = ("latest",)) -> Published:
        """Publish all levels under the next number of ``name`` in a store, for devices to pull, and tag it.

        Args:
            name: lower-case letters, digits, ``.``, ``_`` and ``-``.
            store: a folder, ``s3://bucket/prefix`` or what else ``nestquant --store`` takes.
            tags: names that move to the version; none leaves it without.

        Raises:
            storage.StorageError: the store refuses.
        """
        registry = Registry(open_store(store))
        for blob in self.manifest.descriptors():
            registry.put_blob(self._model.blobs.read(blob), blob.media_type)
        # Its deltas start from versions of the store that it came from.
        draft = Manifest.model_validate({**self.manifest.with_deltas((), {}).model_dump(), "name": name})
        published = registry.publish(draft)
        for tag in tags:
            registry.tag_forward(name, tag, published.version)
        return published

    def extra_repr(self) -> str:
        """Describe bits and levels."""
        return f"bits={self.bits}, level={self.level}, in memory={self.paged_in}"

    def _as_store(self) -> MemoryStore:
        """Return a store that holds the version and nothing else."""
        blobs, manifest, store = self._model.blobs, self.manifest, MemoryStore()
        if isinstance(blobs, StoreBlobs) and isinstance(blobs.registry.store, MemoryStore):
            return blobs.registry.store
        for blob in manifest.descriptors():
            store.put(blob_key(blob.digest), blobs.read(blob), mode="create")
        store.put(manifest_key(manifest.name, manifest.version), canonical_json(manifest), mode="create")
        return store

    def _checked(self, level: int) -> int:
        if level not in self.levels:
            raise ValueError(f"{self.manifest.name} has levels 0 to {self.levels[-1]}; got {level!r}")
        return level

    def _run(self, level: int | None) -> None:
        """Run at a level in memory; a layer with fewer levels runs at its highest."""
        for _, layer in self._model.layers():
            layer.nested.set_level(None if level is None else min(level, layer.nested.level_count - 1))
        self._level = level
