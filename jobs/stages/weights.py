"""Before any work: bring the weights to where workers can read them, build the network's outline, check that the two
fit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.errors import PlanError
from jobs.spec.job import PreprocessSpec
from jobs.spec.model import ModelSpec
from nestquant.engines.images import Preprocessing
from nestquant.surgery import LayerScan, execution_order, find_layers
from storage.layout import blob_key
from storage.registry import Registry
from workers.errors import Need, one_line
from workers.executor import Executor
from workers.footprint import Footprint
from workers.inputs import networks
from workers.inputs.checkpoint import to_safetensors
from workers.inputs.entry import LIBRARY
from workers.inputs.files import fetch
from workers.inputs.fit import Architecture, check_fit, check_shapes
from workers.inputs.tensors import TensorInfo, TensorReader
from workers.inputs.weights import MADE_BYTES_PER_BYTE, MEDIA_TYPE_CHECKPOINT, MadeWeights, WeightsTask, make_weights
from workers.tasks import Code, NetworkRef, TensorSource

_UNTRACED_INPUTS = 128
"""Inputs that a network holds at once, at most, where it cannot be traced: VGG, the worst of the classics, holds 75."""


@dataclass(frozen=True)
class StagedModel:
    """A model ready to be planned: how tasks name it, its layers, and what is known of its tensors.

    ``activation_bytes``: what one forward pass holds at once for each image, input and weights left out. ``classes``:
    how many it tells apart; None where that is not known without running it, or where it tells none, as ``no_classes``
    says.
    """

    network: NetworkRef
    source_digest: str
    tensors: Mapping[str, TensorInfo]
    scan: LayerScan
    order: tuple[str, ...]
    preprocessing: Preprocessing
    parameters: int
    activation_bytes: int
    notes: tuple[str, ...]
    classes: int | None = None
    no_classes: str = ""


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
    trace = _trace(spec, network, preprocessing)
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
        order=trace.order,
        preprocessing=preprocessing,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        activation_bytes=trace.activation_bytes,
        notes=(*notes, *trace.notes),
        classes=trace.classes,
        no_classes=trace.no_classes,
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


@dataclass(frozen=True)
class _Trace:
    """What a forward pass without data tells; see ``StagedModel``."""

    order: tuple[str, ...]
    activation_bytes: int
    notes: tuple[str, ...]
    classes: int | None
    no_classes: str


def _trace(spec: ModelSpec, network: nn.Module, preprocessing: Preprocessing) -> _Trace:
    """Trace the order of execution, the memory of a forward and the shape of its answer without computing anything;
    some networks do not run on the meta device, and are listed as registered.

    Raises:
        PlanError: it runs on the inputs that its library states, but not on those that the spec asks for.
    """
    shape = preprocessing.input_shape
    example = torch.zeros(1, *shape, device="meta")
    footprint, answers = Footprint(), list[Any]()
    handle = network.register_forward_hook(lambda _, __, answer: answers.append(answer))
    try:
        with footprint:
            traced = execution_order(network, example)
    except Exception as error:  # whatever the network's forward raises
        own = spec.library == LIBRARY
        stated = shape if own else networks.default_preprocessing(spec.library, network, spec.kwargs).input_shape
        if stated != shape and _runs(network, stated):
            sides = " x ".join(map(str, shape))
            raise PlanError(
                f"preprocess: {spec.library} {spec.arch} does not run on inputs of {sides} ({one_line(error)}), but on "
                f"{' x '.join(map(str, stated))}; leave preprocess.size, mean and std out, or set model.kwargs."
            ) from error
        order = tuple(site.name for site in find_layers(network).layers)
        guessed = max(footprint.peak_bytes, _UNTRACED_INPUTS * example.nbytes)
        text = f"{spec.arch} does not run without data ({type(error).__name__}): its layers stand as registered."
        return _Trace(order, guessed, (text,), None, "")
    finally:
        handle.remove()
    notes = (
        ()
        if not traced.never_ran
        else (f"{len(traced.never_ran)} layers never ran and stand last: {', '.join(traced.never_ran[:3])}.",)
    )
    return _Trace(traced.names, footprint.peak_bytes, notes, *_classes(network, answers[-1]))


def _runs(network: nn.Module, shape: tuple[int, int, int]) -> bool:
    try:
        with torch.no_grad():
            network(torch.zeros(1, *shape, device="meta"))
    except Exception:  # as above
        return False
    return True


def _classes(network: nn.Module, answer: Any) -> tuple[int | None, str]:
    """Return how many classes the answer to one image tells apart, or None and why it tells none."""
    if getattr(network, "num_classes", None) == 0:
        return None, "it has no classifier (num_classes: 0) and gives features"
    if not isinstance(answer, Tensor):
        return None, f"it answers with a {type(answer).__name__} and not with one tensor"
    if answer.ndim != 2 or answer.shape[1] < 2:
        return None, f"it answers one image with a tensor {tuple(answer.shape)} and not (1, classes)"
    return int(answer.shape[1]), ""
