"""Before any work: bring the weights to where workers can read them, build the network's outline, check that the two
fit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from jobs.errors import PlanError
from jobs.spec.job import PreprocessSpec
from jobs.spec.model import ModelSpec
from jobs.stages.trace import Trace, trace_forward
from nestquant.engines.images import Preprocessing
from nestquant.surgery import LayerScan, find_layers
from storage.layout import blob_key
from storage.registry import Registry
from workers.errors import Need
from workers.executor import Executor
from workers.inputs import networks
from workers.inputs.checkpoint import to_safetensors
from workers.inputs.entry import LIBRARY
from workers.inputs.files import fetch
from workers.inputs.fit import Architecture, check_fit, check_shapes
from workers.inputs.tensors import TensorInfo, TensorReader
from workers.inputs.weights import MADE_BYTES_PER_BYTE, MEDIA_TYPE_CHECKPOINT, MadeWeights, WeightsTask, make_weights
from workers.tasks import Code, NetworkRef, TensorSource


@dataclass(frozen=True)
class StagedModel:
    """A model ready to be planned: how tasks name it, its layers, and what is known of its tensors.

    ``trace`` is what its forward told without data.
    """

    network: NetworkRef
    source_digest: str
    tensors: Mapping[str, TensorInfo]
    scan: LayerScan
    trace: Trace
    preprocessing: Preprocessing
    parameters: int
    notes: tuple[str, ...]


def outline(spec: ModelSpec) -> nn.Module:
    """Return the network without memory (meta device).

    Raises:
        ModelError: unknown name or arguments.
    """
    return networks.build(spec.library, spec.arch, spec.kwargs, meta=True)


def stage(
    spec: ModelSpec,
    preprocess: PreprocessSpec,
    network: nn.Module,
    folder: Path,
    *,
    executor: Executor,
    registry: Registry | None,
    code: Code | None = None,
) -> StagedModel:
    """Make the weights readable, tensor by tensor, and scan the network.

    No more than a tensor's header passes through this process, but for a pickled checkpoint that is converted.

    Args:
        spec: which network and weights.
        preprocess: what the spec says about inputs.
        network: its outline.
        folder: a scratch folder of this job.
        executor: makes the weights that no checkpoint holds.
        registry: where to put the weights for workers on other machines; None where workers see this machine's files.
        code: of the factory that builds the network, where it is no library's.

    Raises:
        CheckpointError: the weights cannot be read or do not fit.
        PlanError: the network does not run on the inputs that the spec asks for.
    """
    notes: tuple[str, ...] = ()
    if spec.checkpoint is None:
        library_weights = _library_weights(spec, network, folder, executor=executor, registry=registry, code=code)
        source, digest = library_weights.source, library_weights.digest
        tensors = check_fit(network, TensorReader(source))
    else:
        path = fetch(spec.checkpoint, folder)
        architecture = Architecture(spec.library, spec.arch, spec.kwargs)
        check = functools.partial(check_shapes, network, name=spec.checkpoint, architecture=architecture)
        weights = to_safetensors(
            path, folder, network.state_dict(), name=spec.checkpoint, choice=spec.weights, check=check
        )
        reader = TensorReader(TensorSource(None, str(weights.path), name=spec.checkpoint))
        tensors = check_fit(network, reader)
        digest, source = _stored(weights.path, reader, registry)
        notes = weights.notes
    preprocessing = resolve_preprocessing(spec, network, preprocess)
    trace = trace_forward(spec, network, preprocessing)
    return StagedModel(
        network=NetworkRef(
            library=spec.library,
            arch=spec.arch,
            kwargs=spec.kwargs,
            source=source,
            preprocessing=preprocessing.to_record(),
            code=code,
        ),
        source_digest=digest,
        tensors=tensors,
        scan=find_layers(network),
        trace=trace,
        preprocessing=preprocessing,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        notes=(*notes, *trace.notes),
    )


def resolve_preprocessing(model: ModelSpec, network: nn.Module, spec: PreprocessSpec) -> Preprocessing:
    """Return the library's preprocessing for a network with what the spec says on top; a size of one's own drops the
    library's resize.

    Raises:
        PlanError: ``mean`` and ``std`` are of different channels.
        ModelError: the network takes no images.
    """
    own = spec.model_dump(mode="json", exclude_none=True)
    if model.library == LIBRARY and {"size", "mean", "std"} <= own.keys():
        record: dict[str, Any] = {"resize": None}
    else:
        record = networks.default_preprocessing(model.library, network, model.kwargs).to_record()
    if spec.size is not None and own["size"] != record.get("size"):
        record["resize"] = None
    record |= own
    if len(record["mean"]) != len(record["std"]):
        raise PlanError(
            f"preprocess.mean is {record['mean']} and preprocess.std {record['std']}: expected a value of each for "
            "every channel."
        )
    return Preprocessing.from_record(record)


def _library_weights(
    spec: ModelSpec,
    network: nn.Module,
    folder: Path,
    *,
    executor: Executor,
    registry: Registry | None,
    code: Code | None,
) -> MadeWeights:
    """Let a worker make the library's pretrained weights, or random ones."""
    task = WeightsTask(
        library=spec.library,
        arch=spec.arch,
        kwargs=spec.kwargs,
        random_seed=spec.random_seed,
        folder=str(folder) if registry is None else None,
        store_uri=None if registry is None else registry.store.uri,
        code=code,
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    need = Need("stage", MADE_BYTES_PER_BYTE * size, "model.arch")
    executor.require(need)
    ((_, result),) = executor.map(make_weights, [task], memory_bytes=need.memory_bytes)
    return result


def _stored(path: Path, reader: TensorReader, registry: Registry | None) -> tuple[str, TensorSource]:
    """Return a checkpoint's digest, its values looked at, and where workers read it: in the store, where they do not
    see this machine's files. There gc takes it away later, as no version names it.
    """
    digest, source = reader.checked_digest(), reader.pinned
    if registry is not None:
        registry.put_file(path, digest=digest, media_type=MEDIA_TYPE_CHECKPOINT)
        source = TensorSource(registry.store.uri, blob_key(digest), name=source.name)
    reader.check_unchanged()
    return digest, source
