"""Nested models from one file, a store, or a device's cache."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from torch import nn

from jobs.api.blobs import StoreBlobs, open_bundle
from jobs.api.model import NestedModel
from nestquant.nested_weight import Residency
from nestquant.surgery import find_layers
from storage.device import Device, open_source
from storage.manifest import Descriptor, Library, Manifest
from storage.registry import Registry
from storage.stores.uri import open_existing_store
from workers import runtime
from workers.errors import ArtifactError, shown

DEFAULT_CACHE = "nestquant-cache"
FloatModel = nn.Module | Callable[[], nn.Module]


def load(
    where: str | os.PathLike[str],
    name: str | None = None,
    ref: str | int = "latest",
    *,
    model: FloatModel | None = None,
    level: int = 0,
    residency: Residency = "packed",
) -> NestedModel:
    """Return a nested model from one file that ``save`` wrote, or from a store; every byte is verified.

    Args:
        where: the file; or with ``name`` a store: a folder, ``s3://bucket/prefix``.
        name: the model's name in the store.
        ref: a tag, a number, or a manifest's digest.
        model: a float model of the same architecture, or a class or function that makes one; its names and shapes are
            compared, its weights do not matter, and it is not changed. Not needed for a network of timm or pytorchcv
            that a job published.
        level: how many levels to page in: 0 is part-bit; ``page_in`` brings the rest.
        residency: ``packed`` (least memory) or ``expanded`` (fast).

    Raises:
        ArtifactError: the file is no nested model, or does not fit ``model``.
        storage.StorageError: there is no such version, or a blob is damaged.
    """
    if name is None:
        manifest, blobs = open_bundle(Path(where))
        return NestedModel(_filled(manifest, blobs, model, level, residency))
    registry = Registry(open_existing_store(str(where)))
    version = registry.resolve(name, ref)
    return NestedModel(_filled(version.manifest, StoreBlobs(registry), model, level, residency))


def pull(
    name: str,
    *,
    store: str,
    ref: str | int = "latest",
    cache: str | os.PathLike[str] = DEFAULT_CACHE,
    model: FloatModel | None = None,
    level: int = 0,
    residency: Residency = "packed",
    unsigned: bool = False,
    root_of_trust: bytes | None = None,
) -> NestedModel:
    """Bring a version into this device's cache as ``nestquant pull`` does, and return it as a model.

    What the cache holds is not fetched again, a download that broke goes on, and without the network what is there
    runs: ``nestquant.pull`` fails then, ``nestquant run`` and ``Device`` do not.

    Args:
        name: the model's name in the store.
        store: a folder, ``s3://...``, ``https://...`` or ``oci://...``.
        ref: a tag, a number, or a manifest's digest.
        cache: the device's folder.
        model: a float model of the same architecture; see ``load``.
        level: levels to bring and to page in: 0 is part-bit. ``page_in`` fetches further ones from the store.
        residency: ``packed`` (least memory) or ``expanded`` (fast).
        unsigned: take the store's word for what a version is (``--allow-unsigned``).
        root_of_trust: the publisher's ``root.json`` (``--trust``); the cache remembers it.

    Raises:
        ArtifactError: the version does not fit ``model``.
        DeviceError: the store cannot be reached, does not have the version, or it is not trusted.
    """
    device = Device(Path(cache), open_source(store), unsigned=unsigned, root_of_trust=root_of_trust)
    device.pull(name, str(ref), level=level)
    manifest = device.manifest(name)
    return NestedModel(_filled(manifest, _Fetched(manifest, device), model, level, residency))


class _Fetched:
    """Blobs of a device's cache; those of a level that is not there yet are brought first."""

    def __init__(self, manifest: Manifest, device: Device) -> None:
        self._files = runtime.FileBlobs(manifest, device.blob_path, verify=True)
        self._device, self._manifest = device, manifest

    def read(self, blob: Descriptor, /) -> bytes:
        """Return a blob's bytes. Raises ``DeviceError``, ``storage.StorageError``."""
        have = self._device.levels(self._manifest.name)
        levels = range(len(have), self._manifest.level_count())
        groups = self._manifest.groups
        missing = next((k for k in levels if any(blob in group.levels[k : k + 1] for group in groups)), None)
        if missing is not None:
            self._device.upgrade(self._manifest.name, missing)
        return self._files.read(blob)


def _filled(
    manifest: Manifest, blobs: runtime.Blobs, model: FloatModel | None, level: int, residency: Residency
) -> runtime.NestedModel:
    if not 0 <= level < manifest.level_count():
        raise ValueError(f"{manifest.name} has levels 0 to {manifest.level_count() - 1}; got {level!r}")
    if model is None and manifest.model.library not in get_args(Library):
        raise ArtifactError(
            f"{manifest.name} version {manifest.version} is {manifest.model.arch}, a network of somebody's own: no "
            "code is stored with it; give model=, a float model of that architecture (its weights do not matter)."
        )
    network = runtime.outlined(manifest, None if model is None else _fitting(manifest, model))
    filled = runtime.fill(network, manifest, blobs, level=level, residency=residency)
    filled.quantize_activations(enabled=True)
    return filled


def _fitting(manifest: Manifest, model: FloatModel) -> nn.Module:
    """Return a copy of the float model, but for the weights that are replaced, once its names and shapes are right."""
    own = model if isinstance(model, nn.Module) else model()
    if not isinstance(own, nn.Module):
        raise ArtifactError(f"model= gave a {type(own).__name__}; expected a torch.nn.Module.")
    sites = {site.name: site for site in find_layers(own).layers}
    where = f"{manifest.name} version {manifest.version} does not fit {type(own).__name__}"
    for record in manifest.layers:
        site = sites.get(record.name)
        if site is None or (site.kind, site.shape) != (record.kind, record.shape):
            there = "no such layer" if site is None else f"{site.kind} {site.shape}"
            raise ArtifactError(
                f"{where}: layer {record.name!r} is {record.kind} {record.shape} in the version; the model given has "
                f"{there}. Give one of the same architecture."
            )
    if meta := [name for name, tensor in own.state_dict().items() if tensor.is_meta]:
        raise ArtifactError(
            f"{where}: its tensors have no memory ({shown(meta)}); build it outside of the meta device."
        )
    replaced = {record.parameter for record in manifest.layers}
    shared = {id(tensor): tensor for name, tensor in own.named_parameters() if name in replaced}
    return copy.deepcopy(own, shared).cpu()
