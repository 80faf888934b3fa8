"""One unit of work from tensor to blob: read, quantize, pack, store, and say so in a small record.

Safe to run twice.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import TypeAdapter

from nestquant.quantized_weight import QuantizedWeight, quantize_weight
from nestquant.surgery import channel_first
from storage.errors import StorageError
from storage.manifest import MEDIA_TYPE_BASE
from storage.registry import Registry
from storage.shard import EncodedShard, IntegerTensor, build_base, build_shard
from storage.stores.blob_store import BlobStore
from storage.stores.uri import open_store
from workers.errors import CheckpointError, WorkError, one_line, shown
from workers.inputs.tensors import TensorReader, open_tensors
from workers.ledger import Ledger, damaged
from workers.pieces import PieceCode
from workers.solutions import read_solution
from workers.tasks import (
    BaseRecord,
    BaseTask,
    Bundle,
    GroupRecord,
    GroupTask,
    PieceRecord,
    PieceTask,
    TaskContext,
    TensorSource,
    Unit,
    UnitRecord,
    UnitResult,
)

_RECORD: TypeAdapter[UnitRecord] = TypeAdapter(UnitRecord)


def run_unit(context: TaskContext, unit: Unit, registry: Registry | None = None) -> UnitResult:
    """Do one unit and return its record.

    Idempotent: blobs are named by their digest, the record is created once, and a unit whose record is already there
    is not done again.

    Raises:
        WorkError: naming the layer, where its weights cannot be quantized.
        storage.StorageError: the store refused.
    """
    begin = time.perf_counter()
    registry = registry or Registry(_store(context.store_uri))
    ledger = Ledger(registry, context.job)
    record = _finished(ledger, unit)
    if record is not None:
        return UnitResult(
            record=record, seconds=time.perf_counter() - begin, bytes_read=0, bytes_written=0, reused=True
        )
    outcome = _do(registry, context.network.source, unit, context.job)
    ledger.keep(ledger.unit_key(unit.kind, unit.index), outcome.record)
    return UnitResult(
        record=outcome.record,
        seconds=time.perf_counter() - begin,
        bytes_read=outcome.bytes_read,
        bytes_written=outcome.bytes_written,
        reused=False,
    )


def _do(registry: Registry, source: TensorSource, unit: Unit, job: str) -> _Done:
    try:
        reader = open_tensors(source)
        if isinstance(unit, GroupTask):
            return _store_group(registry, reader, unit, job)
        return _store_base(registry, reader, unit)
    except (WorkError, StorageError):
        raise  # names its layer or key
    except Exception as error:  # a time-out, no memory, or a fault of ours: whose it was must be known
        kind, names = (
            ("Layers", list(dict.fromkeys(piece.layer for piece in unit.pieces)))
            if isinstance(unit, GroupTask)
            else ("Parameters", list(unit.parameters))
        )
        raise WorkError(f"{kind} {shown(names)}: {one_line(error)}.") from error


def run_bundle(bundle: Bundle) -> list[UnitResult]:
    """Do a task's units in order."""
    # Anew for each task: what a registry has seen of gc's list holds for a job, and a worker outlives many.
    registry = Registry(_store(bundle.context.store_uri))
    return [run_unit(bundle.context, unit, registry) for unit in bundle.units]


@dataclass(frozen=True)
class _Done:
    record: GroupRecord | BaseRecord
    bytes_read: int
    bytes_written: int


@functools.lru_cache(maxsize=4)
def _store(uri: str) -> BlobStore:
    """A way to a store, with its connections; it remembers nothing of what lies there."""
    return open_store(uri)


def _finished(ledger: Ledger, unit: Unit) -> UnitRecord | None:
    key, then = ledger.unit_key(unit.kind, unit.index), "this unit is done again"
    record = ledger.find(key, _RECORD, then=then)
    if record is None:
        return None
    if not _is_of(record, unit):
        raise damaged(key, "it is of another unit", then)
    registry = ledger.registry
    named = record.levels if isinstance(record, GroupRecord) else (record.descriptor,)
    return record if all(registry.has_blob(descriptor) for descriptor in named) else None


def _is_of(record: UnitRecord, unit: Unit) -> bool:
    """Tell whether a record says what this unit does: a copied or misplaced one would pass for it."""
    if (record.kind, record.index) != (unit.kind, unit.index):
        return False
    if not isinstance(record, GroupRecord) or not isinstance(unit, GroupTask):
        return True
    spans = [(piece.layer, piece.start, piece.stop) for piece in record.pieces]
    return spans == [(piece.layer, piece.start, piece.stop) for piece in unit.pieces]


def _store_group(registry: Registry, reader: TensorReader, task: GroupTask, job: str) -> _Done:
    coded: list[tuple[PieceTask, QuantizedWeight]] = []
    records = []
    bytes_read = 0
    reader = reader.planned(_reads(piece) for piece in task.pieces)
    for piece in task.pieces:
        weight = read_piece(reader, piece)
        bytes_read += weight.numel() * weight.element_size()
        try:
            quantized = (
                quantize_weight(weight, piece.config) if piece.solution is None else read_solution(registry, job, piece)
            )
        except ValueError as error:
            raise WorkError(f"Layer {piece.layer!r}, output channels {piece.start}:{piece.stop}: {error}") from error
        coded.append((piece, quantized))
        records.append(losses(piece, weight, quantized))
    shards = encode_group(coded)
    descriptors = tuple(map(registry.put_shard, shards))
    record = GroupRecord(
        index=task.index, levels=descriptors, pieces=tuple(_with_bytes(piece, shards) for piece in records)
    )
    return _Done(record, bytes_read, sum(descriptor.size_bytes for descriptor in descriptors))


def encode_group(pieces: Sequence[tuple[PieceTask, QuantizedWeight]]) -> list[EncodedShard]:
    """Return the shards of a group, one for each level, from its pieces and what each was quantized to."""
    level_count = max(len(piece.bits) for piece, _ in pieces)
    integers: list[dict[str, IntegerTensor]] = [{} for _ in range(level_count)]
    qparams: dict[str, np.ndarray] = {}
    for piece, quantized in pieces:
        code = PieceCode(piece.layer, piece.start, piece.stop)
        for level in range(piece.config.level_count):
            integers[level] |= code.integers(quantized, level)
        qparams |= code.grid(quantized)
    return [build_shard(integers[level], qparams if level == 0 else {}) for level in range(level_count)]


def _store_base(registry: Registry, reader: TensorReader, task: BaseTask) -> _Done:
    reader = reader.planned((name, None, None) for name in task.parameters)
    tensors = {name: reader.read(name) for name in task.parameters}
    data = build_base({name: as_numpy(tensor) for name, tensor in tensors.items()})
    descriptor = registry.put_blob(data, MEDIA_TYPE_BASE)
    bytes_read = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return _Done(BaseRecord(index=task.index, descriptor=descriptor), bytes_read, descriptor.size_bytes)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Numpy knows no bfloat16; float32 holds every bfloat16 exactly."""
    return (tensor.to(torch.float32) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def read_piece(reader: TensorReader, piece: PieceTask) -> torch.Tensor:
    """Return a piece's float32 weight, output channels first: shape (stop - start, in channels per group, *kernel).

    Raises:
        CheckpointError: the checkpoint's tensor has another shape than the plan's.

    """
    shape = reader.tensors[piece.parameter].shape
    if shape != piece.shape:
        raise CheckpointError(
            f"Layer {piece.layer!r}: {piece.parameter!r} has shape {shape} in the checkpoint; "
            f"the network has {piece.shape}."
        )
    if piece.kind == "conv_transpose2d":
        whole = channel_first(reader.read(piece.parameter), piece.kind, piece.groups)
        return whole[piece.start : piece.stop].to(torch.float32).contiguous()
    return reader.read_rows(piece.parameter, piece.start, piece.stop).to(torch.float32)


def _with_bytes(record: PieceRecord, shards: Sequence[EncodedShard]) -> PieceRecord:
    code = PieceCode(record.layer, record.start, record.stop)
    keys = [code.key(level) for level in range(len(record.noise))]
    sizes = tuple(shard.payload_bytes[key] for key, shard in zip(keys, shards, strict=False))
    return record.model_copy(update={"level_bytes": sizes})


def _reads(piece: PieceTask) -> tuple[str, int | None, int | None]:
    """Return what `read_piece` reads, for `TensorReader.planned`."""
    if piece.kind == "conv_transpose2d":
        return piece.parameter, None, None
    return piece.parameter, piece.start, piece.stop


def losses(piece: PieceTask, weight: torch.Tensor, quantized: QuantizedWeight) -> PieceRecord:
    """Return what quantizing a piece lost: sums of squares in float64, and flips.

    They depend on the piece alone, not on who computes it.
    """
    noise = tuple(
        float(quantized.dequantize(level).sub_(weight).double().square().sum())
        for level in range(quantized.config.level_count)
    )
    return PieceRecord(
        layer=piece.layer,
        start=piece.start,
        stop=piece.stop,
        signal=float(weight.double().square().sum()),
        noise=noise,
        flips=quantized.flips(weight),
    )
