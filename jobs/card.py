"""A version's model card in the HF hub's format: its metadata, then what it is, its levels, and how to run it."""

from __future__ import annotations

import json
import shlex
from typing import Any

from jobs.measurements import Measurements
from storage.manifest import Manifest, level_name
from storage.registry import Resolved
from storage.wording import printable

OWN_STORE = "nestquant"
"""Where a hub folder keeps the version as a store."""

_MOST = 400


def card(resolved: Resolved, measured: Measurements | None, *, address: str | None = None) -> str:
    """Return a version's model card.

    Args:
        resolved: the version.
        measured: what its job measured; None where it left no report.
        address: where devices pull it from; None in a folder of `jobs.hub`, which holds float weights and the store.
    """
    from huggingface_hub import ModelCard, ModelCardData

    manifest, record = resolved.manifest, resolved.manifest.model
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
        weights = f"{', '.join(map(str, sorted(widths)))} bits"
        if address is None:
            weights = f"`{level_folder(level, levels)}/model.safetensors`, {weights}"
        moved = sum(manifest.sizes.level_bytes[: level + 1]) + manifest.sizes.base_bytes
        top1 = " | ".join(_top1(measured, level, activations=activations) for activations in (False, True))
        rows.append(f"| {level_name(level, levels)} | {weights} | {moved:,} | {top1} |")
    text = f"""# {manifest.name} version {resolved.version}

{code(record.library)} {code(record.arch)}, {record.parameters:,} parameters, {manifest.sizes.weights:,} of them
quantized by NestQuant: the low-bit model is nested in the high-bit one, so a device fetches the first, and
the rest later.

{chr(10).join(rows)}

*bytes to fetch*: nested shards and float parameters, as a device fetches them.{_floats_note(address)}

* manifest: `{resolved.digest}`
* source weights: `{record.source_digest}`
* recipe: {_json(manifest.recipe)}
* stays float: {", ".join(code(float_layer.name) for float_layer in manifest.kept_float) or "nothing"}
* preprocessing: {_json(manifest.preprocessing)}

## Run it

{"Nested, from this folder as a store:" if address is None else "Nested, on a device:"}

```
{pull_command(manifest.name, resolved.version, address)}
```
{_timm_snippet(manifest) if address is None else ""}"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def pull_command(name: str, version: int, address: str | None) -> str:
    """Return what a person types to pull a version; from the hub folder that one stands in without an address."""
    if address is None:
        return f"nestquant pull {name}@{version} --store ./{OWN_STORE} --allow-unsigned"
    return f"nestquant pull {name}@{version} --store {shlex.quote(printable(address))}"


def level_folder(level: int, levels: int) -> str:
    """Return where a level's weights stand in a hub folder: full-bit at its top."""
    return "." if level == levels - 1 else "part-bit" if level == 0 else f"level-{level}"


def code(text: str) -> str:
    """Return a stranger's words as a span of code that nothing in them ends: one line, of 400 characters at most."""
    line = " ".join(printable(text[:_MOST]).replace("`", "'").split())
    return f"`{line or ' '}`"


def _json(document: dict[str, Any] | None) -> str:
    return code(json.dumps(document, sort_keys=True))


def _floats_note(address: str | None) -> str:
    if address is not None:
        return ""
    return " The files of floats here are larger:\nthey are the same weights for tools that know no nesting."


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


def _top1(measured: Measurements | None, level: int, *, activations: bool) -> str:
    mode = None if measured is None else measured.mode(level, activations=activations)
    return "not measured" if mode is None else f"{mode.top1:.2f} % of {mode.total}"
