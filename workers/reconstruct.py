"""The recipe ``calibrated`` on workers: moments of a layer's inputs, image chunk by image chunk, and its solution.

Layer after layer: the inputs of each come from a network whose earlier layers are quantized already. A chunk's moments
depend on its images and the solutions before alone, and chunks are added in their order, so any number of workers
gives the same integers on one kind of machine (``docs/accuracy.md`` says what another kind may change).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestquant.calibrated import calibrate_weight
from nestquant.modules import from_float, nested_layers
from nestquant.moments import Moments, input_columns
from nestquant.quantize import quantize_weight
from nestquant.surgery import replace
from storage.errors import AlreadyExists, NotFound
from storage.manifest import Record, canonical_json
from storage.registry import Registry
from storage.tensor_file import load_tensors, save_tensors
from storage.uri import open_store
from workers.checkpoint import fetch, load_network
from workers.errors import WorkError
from workers.images import open_images
from workers.quantize import read_piece
from workers.solutions import MEDIA_TYPE_SOLUTION, SolvedRecord, read_solution, save_solution, solved_key
from workers.tasks import PieceTask, TaskContext
from workers.tensors import TensorSource, open_tensors
from workers.threads import threads
from workers.zoo import Preprocessing

MAX_INPUTS = 8192
"""A layer with more inputs for an output channel is quantized without data: one matrix would take over 512 MiB."""


class MomentsTask(Record):
    """Take the moments of one layer's inputs over images ``start:stop``, for each level that the network runs at.

    ``solved`` are the layers before it, each as a piece of all its output channels.
    """

    context: TaskContext
    library: str
    arch: str
    kwargs: dict[str, Any]
    layer: PieceTask
    solved: tuple[PieceTask, ...]
    level_count: int
    data: str
    start: int
    stop: int
    batch_size: int
    preprocessing: dict[str, Any]
    chunk: int


class Gathered(Record):
    """What one chunk gave: ``found`` is false where the layer was not called, or no image could be read."""

    found: bool
    samples: int
    skipped: tuple[tuple[str, str], ...]


class SolveTask(Record):
    """Solve one layer from the moments of the chunks that have any; without data where none has."""

    context: TaskContext
    layer: PieceTask
    level_count: int
    chunks: tuple[int, ...]
    samples: int
    skipped: tuple[tuple[str, str], ...]


def moments_key(job: str, solution: int, chunk: int) -> str:
    """Return where a chunk's moments stand until the layer is solved."""
    return f"jobs/{job.removeprefix('sha256:')}/moments/{solution:06d}-{chunk:06d}.safetensors"


@torch.inference_mode()
def gather(task: MomentsTask) -> Gathered:
    """Run the float and the quantized network over a chunk, up to the layer, and store the moments of its inputs.

    Raises:
        WorkError: an image set cannot be read, or an input is NaN or infinite; the message names the layer.
    """
    assert task.layer.solution is not None
    registry = Registry(open_store(task.context.store_uri))
    network, quantized = (_network(task) for _ in range(2))
    module = network.get_submodule(task.layer.layer)
    # One thread: how a sum is split over threads changes its last bit.
    with tempfile.TemporaryDirectory(prefix="nestquant-gather-") as folder, threads(1):
        for piece in task.solved:
            weight = read_solution(registry, task.context.job, piece)
            replace(
                quantized, piece.layer, from_float(quantized.get_submodule(piece.layer), weight, residency="expanded")
            )
        images = open_images(fetch(task.data, Path(folder)))
        preprocessing = Preprocessing.from_record(task.preprocessing)
        span = {"batch_size": task.batch_size, "start": task.start, "stop": task.stop}
        batches = [inputs for inputs, _ in images.batches(preprocessing, **span)]
        floats = list(_inputs(network, task.layer.layer, batches))
        tensors: dict[str, Any] = {}
        for level in range(task.level_count) if floats else ():
            _run_at(quantized, level)
            pairs = zip(floats, _inputs(quantized, task.layer.layer, batches), strict=True)
            found = Moments.merge([Moments.of(input_columns(module, x), input_columns(module, y)) for x, y in pairs])
            tensors |= {f"{level}/{name}": tensor.numpy() for name, tensor in _fields(found).items()}
    skipped, samples = tuple(images.skipped), sum(len(batch) for batch in batches)
    if tensors:
        key = moments_key(task.context.job, task.layer.solution, task.chunk)
        registry.store.put(key, save_tensors(tensors, {}), mode="overwrite")
    return Gathered(found=bool(tensors), samples=samples, skipped=skipped)


def solve(task: SolveTask) -> SolvedRecord:
    """Add the chunks' moments up, choose the layer's integers and biases, and store them.

    Raises:
        WorkError: naming the layer, where its weights cannot be quantized or its moments are not finite.
    """
    assert task.layer.solution is not None
    registry, job, index = Registry(open_store(task.context.store_uri)), task.context.job, task.layer.solution
    source = TensorSource(task.context.source_store, task.context.source_key)
    weight = read_piece(open_tensors(source), task.layer)
    keys = [moments_key(job, index, chunk) for chunk in task.chunks]
    try:
        with threads(1):
            if keys:
                levels = _merged(registry, keys, task.level_count, task.layer.config.level_count)
                quantized = calibrate_weight(weight, task.layer.config, levels, groups=task.layer.groups)
            else:
                quantized = quantize_weight(weight, task.layer.config)
    except (ValueError, RuntimeError) as error:  # a RuntimeError is the linear algebra's
        raise WorkError(f"Layer {task.layer.layer!r}: {error}") from error
    record = SolvedRecord(
        layer=task.layer.layer,
        descriptor=registry.put_blob(save_solution(quantized), MEDIA_TYPE_SOLUTION),
        biases=quantized.biases is not None,
        samples=task.samples,
        skipped=task.skipped,
    )
    with contextlib.suppress(AlreadyExists):  # a second run by design wrote the same
        registry.store.put(solved_key(job, index), canonical_json(record), mode="create")
    for key in keys:
        with contextlib.suppress(NotFound):
            registry.store.delete(key)
    return record


def _merged(registry: Registry, keys: list[str], level_count: int, own_levels: int) -> list[Moments]:
    """Return the moments for each of the layer's levels, chunks added in order.

    A layer with fewer levels than the network has its last one in all the network's further levels, and the last of
    those, full-bit, is what it is made for.
    """
    chosen = [*range(own_levels - 1), level_count - 1]
    totals: list[Moments] = []
    for key in keys:
        tensors, _ = load_tensors(registry.store.get(key))
        for at, level in enumerate(chosen):
            fields = {name: torch.from_numpy(tensors[f"{level}/{name}"].copy()) for name in ("x", "y", "xy", "yy")}
            part = Moments(count=int(tensors[f"{level}/count"][0]), **fields)
            if at < len(totals):
                totals[at] = Moments.merge([totals[at], part])
            else:
                totals.append(part)
    return totals


def _fields(moments: Moments) -> dict[str, Tensor]:
    return {
        "count": torch.tensor([moments.count]),
        "x": moments.x,
        "y": moments.y,
        "xy": moments.xy.contiguous(),
        "yy": moments.yy.contiguous(),
    }


def _network(task: MomentsTask) -> nn.Module:
    source = TensorSource(task.context.source_store, task.context.source_key)
    return load_network(task.library, task.arch, task.kwargs, source)


def _run_at(network: nn.Module, level: int) -> None:
    """Run every nested layer at a level of the network's; one with fewer levels at its last."""
    for layer in nested_layers(network).values():
        layer.nested.set_level(min(level, layer.nested.level_count - 1))


class _Reached(Exception):
    """No error: carries a layer's input out of a forward that need not go on."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


def _inputs(network: nn.Module, layer: str, batches: list[Tensor]) -> Iterator[Tensor]:
    """Yield what goes into the layer's first call for each batch; nothing where it is not called."""

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:  # called by keyword: as good as not called
            return
        if not torch.isfinite(args[0]).all():
            raise WorkError(
                f"Layer {layer!r}: its input holds NaN or infinity; check the checkpoint and preprocessing."
            )
        raise _Reached(args[0])

    handle = network.get_submodule(layer).register_forward_pre_hook(stop)
    try:
        for batch in batches:
            try:
                network(batch)
            except _Reached as reached:
                yield reached.inputs
    finally:
        handle.remove()
