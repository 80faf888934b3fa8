"""Out of the house: a version as a folder that the HF hub's tools take, with card, configuration and every level."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from jobs.card import OWN_STORE, card, level_folder
from jobs.errors import JobError
from jobs.measurements import read_measurements
from storage.device import Device, StoreSource
from storage.device.bundle import documents_of
from storage.manifest import Manifest
from storage.registry import Registry, Resolved
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from workers import runtime
from workers.float_weights import float_network
from workers.inputs import networks
from workers.scratch import scratch


class HubFolderError(JobError):
    """The folder cannot be written; the message says why."""


def export_hf(store: BlobStore, name: str, ref: str, folder: Path) -> Manifest:
    """Write a version as a folder for the HF hub, which appears when it is whole; return its manifest.

        README.md                 the model card
        config.json               timm's configuration (of pytorchcv: library, name, arguments)
        model.safetensors         full-bit weights as floats, under the network's own names
        part-bit/ (level-1/ ...)  the same two files of each other level
        nestquant/                the version as a store: shards, manifest, what is signed

    Raises:
        HubFolderError: the folder is there and not empty.
        storage.StorageError, WorkError: the version is not there, or is damaged.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HubFolderError(f"{folder} is there, and not empty; choose another folder.")
    resolved = Registry(store).resolve(name, ref)
    manifest = resolved.manifest
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with scratch("export") as cache:
            device = Device(cache / "cache", StoreSource(store), unsigned=True)
            device.pull(name, str(resolved.version), level=manifest.level_count() - 1)
            part.mkdir(parents=True)
            _write_levels(manifest, device, part)
            _write_store(store, resolved, device, part / OWN_STORE)
        text = card(resolved, read_measurements(Registry(store), name, resolved.version))
        (part / "README.md").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _write_levels(manifest: Manifest, device: Device, part: Path) -> None:
    from safetensors.torch import save_file

    levels = manifest.level_count()
    model = runtime.load(manifest, device.blob_path)
    preprocessing = model.preprocessing
    for level in range(levels):
        model.to_level(level)
        network = float_network(model, preprocessing.input_shape)
        place = part / level_folder(level, levels)
        place.mkdir(exist_ok=True)
        state = {key: tensor.contiguous().clone() for key, tensor in network.state_dict().items()}
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        if manifest.model.library == "timm":
            networks.hub_config(network, preprocessing, place)
        else:
            record = manifest.model
            document = {
                "library_name": record.library,
                "architecture": record.arch,
                "model_args": record.kwargs,
                "preprocessing": manifest.preprocessing,
            }
            (place / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")


def _write_store(store: BlobStore, resolved: Resolved, device: Device, folder: Path) -> None:
    from storage.layout import blob_key

    target = LocalStore(folder)
    for blob in resolved.manifest.descriptors():
        target.put_file(blob_key(blob.digest), device.blob_path(blob))
    for key, raw in documents_of(store, resolved.manifest.name, resolved):
        target.put(key, raw, mode="create")
    shutil.rmtree(folder / ".tmp", ignore_errors=True)  # where a store in a folder writes before it renames
