"""The task that makes what an engine runs a version from: graph and layout, put into the store as blobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from nestquant.engines.images import Preprocessing
from nestquant.observers import Histogram, activation_range
from storage.engine_layout import build_layout
from storage.manifest import (
    MEDIA_TYPE_LAYOUT,
    MEDIA_TYPE_ONNX_GRAPH,
    ActivationRange,
    Engine,
    EngineRecord,
    LayerRecord,
    Manifest,
    ModelRecord,
    Record,
)
from storage.registry import Registry
from storage.shard import read_base, read_shard
from storage.stores.uri import open_store
from workers.engines.graph import EngineGraph, LayerGrid, with_outputs
from workers.engines.trace import IMAGE, trace
from workers.errors import WorkError
from workers.inputs import own
from workers.inputs.images import fetch_images
from workers.pieces import Grid, PieceCode
from workers.scratch import scratch
from workers.tasks import Code

Array = npt.NDArray[Any]
ACTIVATION_BITS = 8


class RangeImages(Record):
    """Images that tell the ranges of what the manifest holds none for: the first layer's input, sums, joins, pools."""

    data: str
    samples: int
    batch_size: int
    observer: str
    percentile: float


class ExportTask(Record):
    """Make a version ready for an engine. ``manifest`` may be a draft; its blobs are in the store."""

    store_uri: str
    engine: Engine
    manifest: Manifest
    images: RangeImages | None = None
    code: Code | None = None


class CheckTask(Record):
    """Look whether an engine can take the layers of a network, before any of them is quantized."""

    engine: Engine
    model: ModelRecord
    layers: tuple[LayerRecord, ...]
    preprocessing: dict[str, Any]
    code: Code | None = None


def check_export(task: CheckTask) -> None:
    """Trace the network and look for every layer in the graph.

    Raises:
        ModelError: the exporter cannot take the network.
        WorkError: the engine cannot do a layer; it names it.
    """
    if task.code is not None:
        own.use(task.code)
    check_layers(task.layers)
    EngineGraph(trace(task.model, Preprocessing.from_record(task.preprocessing)), task.layers)


def check_layers(layers: tuple[LayerRecord, ...]) -> None:
    """Raise `WorkError` for a layer whose grid no int8 engine has."""
    for layer in layers:
        if layer.scheme != "symmetric":
            raise WorkError(
                f"Layer {layer.name!r} is {layer.scheme}: engines take symmetric weights alone (zero point 0); "
                "quantize with 'scheme: symmetric', or export for no engine."
            )
        if layer.activation is not None and layer.activation.bits != ACTIVATION_BITS:
            raise WorkError(
                f"Layer {layer.name!r}: activations of {layer.activation.bits} bits; engines have 8; set "
                "quantize.activations.bits to 8."
            )


def export_version(task: ExportTask) -> EngineRecord:
    """Trace, fold, store; the same manifest gives the same bytes.

    Raises:
        WorkError: naming the layer or parameter that does not fit.
        storage.StorageError: a blob is missing or damaged, or the store refuses.
    """
    manifest = task.manifest
    if task.code is not None:
        own.use(task.code)
    check_layers(manifest.layers)
    if manifest.preprocessing is None:
        raise WorkError(f"{manifest.name} version {manifest.version} says nothing of its inputs; publish it anew.")
    preprocessing = Preprocessing.from_record(manifest.preprocessing)
    registry = Registry(open_store(task.store_uri))
    traced = trace(manifest.model, preprocessing)
    state = {name: value for blob in manifest.base for name, value in read_base(registry.get_blob(blob)).items()}
    grids = dict(_grids(manifest, registry))
    activations = any(layer.activation is not None for layer in manifest.layers)
    inner: dict[str, ActivationRange] = {}
    if activations and task.images is not None:
        inner = _inner_ranges(EngineGraph(traced, manifest.layers), task, registry, state, grids)
    graph, layout, values = EngineGraph(traced, manifest.layers).finish(
        state, grids, activations=activations, inner=inner
    )
    return EngineRecord(
        engine=task.engine,
        graph=registry.put_blob(graph, MEDIA_TYPE_ONNX_GRAPH),
        layout=registry.put_blob(build_layout(layout, values), MEDIA_TYPE_LAYOUT),
        activations=activations,
    )


def _grids(manifest: Manifest, registry: Registry) -> Iterator[tuple[str, LayerGrid]]:
    opened: dict[int, Any] = {}
    for layer in manifest.layers:
        parts = []
        for piece in layer.pieces:
            if piece.group not in opened:
                opened = {piece.group: read_shard(registry.get_blob(manifest.groups[piece.group].levels[0]))}
            code = PieceCode(layer.name, piece.start, piece.stop)
            parts.append(code.read_grid(opened[piece.group], biases=layer.biases))
        grid = Grid.joined(parts)
        yield layer.name, LayerGrid(grid.qparams.scale.numpy(), None if grid.biases is None else grid.biases.numpy())


def _inner_ranges(
    graph: EngineGraph, task: ExportTask, registry: Registry, state: dict[str, Array], grids: dict[str, LayerGrid]
) -> dict[str, ActivationRange]:
    """Run the version at full-bit, its activations float, and read the ranges that the manifest does not hold."""
    from nestquant.engines.ort import options, session_with
    from nestquant.engines.weights import engine_tensors

    manifest, images = task.manifest, task.images
    assert images is not None, "there is nothing to read ranges from"
    assert manifest.preprocessing is not None, "looked at before"
    ranges = graph.unknown_ranges()
    model, layout, values = graph.finish(state, grids, activations=False)
    tensors = {
        tensor.name: array
        for tensor, array in engine_tensors(manifest, layout, values, registry.get_blob, manifest.level_count() - 1)
    }
    outputs = sorted(set(ranges.values()) - {IMAGE})
    session = session_with(with_outputs(model, outputs), tensors, options(threads=1, float_weights=True))
    histograms = dict.fromkeys(ranges.values(), Histogram.empty())
    count = 0
    with scratch("export") as folder:
        sample = fetch_images(images.data, folder).sample(images.samples)
        for inputs, _ in sample.batches(
            Preprocessing.from_record(manifest.preprocessing), batch_size=images.batch_size, start=0, stop=len(sample)
        ):
            batch = inputs.numpy()
            count += len(batch)
            for name, value in zip([IMAGE, *outputs], [batch, *session.run(outputs, {IMAGE: batch})], strict=True):
                if name in histograms:
                    histograms[name] = histograms[name].merge(Histogram.of(value))
    if not count:
        raise WorkError(f"{images.data}: none of its images could be read, so that ranges cannot be found.")
    return {key: _range_of(histograms[name], images) for key, name in ranges.items()}


def _range_of(histogram: Histogram, images: RangeImages) -> ActivationRange:
    extent = activation_range(
        histogram,
        observer=images.observer,  # type: ignore[arg-type]  # one of the method's; it says so where it is not
        bits=ACTIVATION_BITS,
        percentile=images.percentile,
    )
    return ActivationRange(
        bits=ACTIVATION_BITS, low=extent.low, high=extent.high, signed=extent.signed, observer=images.observer
    )
