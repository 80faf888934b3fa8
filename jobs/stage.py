"""Before any work: bring the weights to where workers can read them, build the network's outline, check that the two
fit.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.spec import ModelSpec, PreprocessSpec
from nestquant.surgery import LayerScan, execution_order, find_layers
from storage.layout import blob_key
from storage.registry import Registry
from workers import zoo
from workers.checkpoint import check_fit, fetch, pretrained_state, random_state, save_state, to_safetensors
from workers.footprint import Footprint
from workers.tensors import TensorInfo, TensorReader, TensorSource
from workers.zoo import Preprocessing

_UNTRACED_INPUTS = 128
"""Inputs that a network holds at once, at most, where it cannot be traced: VGG, the worst of the classics, holds 75."""


@dataclass(frozen=True)
class Staged:
    """A model ready to be planned: its outline on the meta device, its layers, and where its weights lie.

    ``activation_bytes``: what one forward pass holds at once for each image, input and weights left out.
    """

    source: TensorSource
    source_digest: str
    tensors: Mapping[str, TensorInfo]
    scan: LayerScan
    order: tuple[str, ...]
    preprocessing: Preprocessing
    parameters: int
    activation_bytes: int
    notes: tuple[str, ...]


def outline(spec: ModelSpec) -> nn.Module:
    """Return the network without memory (meta device).

    Raises:
        ModelError: unknown name or arguments.
    """
    return zoo.build(spec.library, spec.arch, spec.kwargs, meta=True)


def stage(
    spec: ModelSpec, preprocess: PreprocessSpec, network: nn.Module, folder: Path, registry: Registry | None
) -> Staged:
    """Make the weights readable, tensor by tensor, and scan the network.

    Args:
        spec: which network and weights.
        preprocess: what the spec says about inputs.
        network: its outline.
        folder: a scratch folder of this job.
        registry: where to put the weights for workers on other machines; None where workers see this machine's files.

    Raises:
        CheckpointError: the weights cannot be read or do not fit.
    """
    path = _weights(spec, folder)
    source = TensorSource(None, str(path))
    reader = TensorReader(source)
    tensors = check_fit(network, reader)
    digest = _file_digest(path)
    if registry is not None:
        source = TensorSource(registry.store.uri, _upload(registry, path))
    preprocessing = resolve_preprocessing(spec.library, network, preprocess)
    order, activation_bytes, notes = _order(spec, network, preprocessing)
    return Staged(
        source=source,
        source_digest=digest,
        tensors=tensors,
        scan=find_layers(network),
        order=order,
        preprocessing=preprocessing,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        activation_bytes=activation_bytes,
        notes=notes,
    )


def resolve_preprocessing(library: str, network: nn.Module, spec: PreprocessSpec) -> Preprocessing:
    """Return the library's preprocessing with what the spec says on top; a size of one's own drops the library's
    resize.
    """
    record: dict[str, Any] = zoo.default_preprocessing(library, network).to_record()
    if spec.size is not None and spec.size != record["size"]:
        record["resize"] = None
    return Preprocessing.from_record(record | spec.model_dump(exclude_none=True))


def _weights(spec: ModelSpec, folder: Path) -> Path:
    if spec.checkpoint is not None:
        return to_safetensors(fetch(spec.checkpoint, folder), folder)
    if spec.pretrained:
        return save_state(pretrained_state(spec.library, spec.arch, spec.kwargs), folder / "pretrained.safetensors")
    assert spec.random_seed is not None
    return save_state(
        random_state(spec.library, spec.arch, spec.kwargs, spec.random_seed), folder / "random.safetensors"
    )


def _order(
    spec: ModelSpec, network: nn.Module, preprocessing: Preprocessing
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Trace the order of execution and the memory of a forward without computing anything; some networks do not run
    on the meta device, and are listed as registered.
    """
    example = torch.zeros(1, len(preprocessing.mean), preprocessing.size, preprocessing.size, device="meta")
    footprint = Footprint()
    try:
        with footprint:
            traced = execution_order(network, example)
    except Exception as error:  # whatever the network's forward raises
        names = tuple(site.name for site in find_layers(network).layers)
        guessed = max(footprint.peak_bytes, _UNTRACED_INPUTS * example.nbytes)
        return (
            names,
            guessed,
            (f"{spec.arch} does not run without data ({type(error).__name__}): its layers stand as registered.",),
        )
    notes = (
        ()
        if not traced.never_ran
        else (f"{len(traced.never_ran)} layers never ran and stand last: {', '.join(traced.never_ran[:3])}.",)
    )
    return traced.names, footprint.peak_bytes, notes


def _upload(registry: Registry, path: Path) -> str:
    """Put the weights into the store under their digest, for workers elsewhere; gc takes them away later, as no
    version names them.
    """
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        return blob_key(registry.put_blob(view, "application/vnd.safetensors").digest)


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
