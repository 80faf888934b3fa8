"""Out of the house: a version as a folder that the HF hub's tools take, with card, configuration and every level."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jobs.errors import JobError
from jobs.result import REPORT, level_name
from storage.device import Device, StoreSource
from storage.device.bundle import documents_of
from storage.errors import NotFound
from storage.manifest import Manifest
from storage.registry import Registry, Resolved
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from workers import runtime
from workers.float_weights import float_network
from workers.inputs import networks
from workers.scratch import scratch

OWN_STORE = "nestquant"


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
    found = Registry(store).resolve(name, ref)
    manifest = found.manifest
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with scratch("export") as cache:
            device = Device(cache / "cache", StoreSource(store), unsigned=True)
            device.pull(name, str(found.version), level=manifest.level_count() - 1)
            part.mkdir(parents=True)
            _write_levels(manifest, device, part)
            _write_store(store, found, device, part / OWN_STORE)
        (part / "README.md").write_text(card(found, _report(store, found)), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def level_folder(level: int, levels: int) -> str:
    """Return where a level's weights stand in the folder: full-bit at its top."""
    return "." if level == levels - 1 else "part-bit" if level == 0 else f"level-{level}"


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


def _write_store(store: BlobStore, found: Resolved, device: Device, folder: Path) -> None:
    from storage.layout import blob_key

    target = LocalStore(folder)
    for blob in found.manifest.descriptors():
        target.put_file(blob_key(blob.digest), device.blob_path(blob))
    for key, raw in documents_of(store, found.manifest.name, found):
        target.put(key, raw, mode="create")
    shutil.rmtree(folder / ".tmp", ignore_errors=True)  # where a store in a folder writes before it renames


def _report(store: BlobStore, found: Resolved) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(Registry(store).get_report(found.manifest.name, found.version, REPORT))
    except NotFound:
        return {}
    return document


def card(found: Resolved, report: dict[str, Any]) -> str:
    """Return a version's model card in the HF hub's format: its metadata, then what it is, levels, and how to run it.

    ``report``: what its job measured; empty where nothing was.
    """
    from huggingface_hub import ModelCard, ModelCardData

    manifest, record = found.manifest, found.manifest.model
    data = ModelCardData(
        library_name=record.library,
        pipeline_tag="image-classification",
        tags=["nestquant", "quantized", record.arch],
        model_name=manifest.name,
    )
    levels = manifest.level_count()
    rows = ["| level | weights | bytes to fetch | top-1 | activations quantized, too |"]
    rows.append("| --- | --- | ---: | ---: | ---: |")
    for level in range(levels):
        widths = {layer.bits[max(0, len(layer.bits) - 1 - level)] for layer in manifest.layers}
        file = f"`{level_folder(level, levels)}/model.safetensors`, {', '.join(map(str, sorted(widths)))} bits"
        moved = sum(manifest.sizes.level_bytes[: level + 1]) + manifest.sizes.base_bytes
        measured = " | ".join(_top1(report, level, activations=activations) for activations in (False, True))
        rows.append(f"| {level_name(level, levels)} | {file} | {moved:,} | {measured} |")
    text = f"""# {manifest.name} version {found.version}

{record.library} `{record.arch}`, {record.parameters:,} parameters, {manifest.sizes.weights:,} of them quantized by
NestQuant: the low-bit model is nested in the high-bit one, so a device fetches the first and later the rest.

{chr(10).join(rows)}

*bytes to fetch*: nested shards and float parameters, as a device fetches them. The files of floats here are larger:
they are the same weights for tools that know no nesting.

* manifest: `{found.digest}`
* source weights: `{record.source_digest}`
* recipe: `{json.dumps(manifest.recipe, sort_keys=True)}`
* stays float: {", ".join(f"`{kept.name}`" for kept in manifest.kept_float) or "nothing"}
* preprocessing: `{json.dumps(manifest.preprocessing, sort_keys=True)}`

## Run it

Nested, from this folder as a store:

```
nestquant pull {manifest.name}@{found.version} --store ./{OWN_STORE} --allow-unsigned
```
{_timm_snippet(manifest)}"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _timm_snippet(manifest: Manifest) -> str:
    if manifest.model.library != "timm":
        return ""
    return f"""
As a float network, full-bit or part-bit:

```python
import timm

model = timm.create_model("local-dir:{manifest.name}", pretrained=True)
part_bit = timm.create_model("local-dir:{manifest.name}/part-bit", pretrained=True)
```
"""


def _top1(report: dict[str, Any], level: int, *, activations: bool) -> str:
    found = (one for one in report.get("measured", []) if one["level"] == level and one["activations"] is activations)
    one = next(found, None)
    return "not measured" if one is None else f"{100 * one['correct'] / one['total']:.2f} % of {one['total']}"
