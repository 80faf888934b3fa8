"""One unit of work, and the network that runs from what it stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.events import StageClock
from jobs.spec.file import parse_spec
from jobs.stages.job import Job
from jobs.stages.preparation import prepare
from nestquant.config import NestConfig
from nestquant.packing import unpack
from nestquant.quantized_weight import quantize_weight
from storage.manifest import canonical_json, piece_key
from storage.shard import read_shard
from workers.errors import CheckpointError, WorkError
from workers.executor import InProcessExecutor
from workers.inputs.tensors import TensorReader
from workers.ledger import Ledger
from workers.quantize import read_piece, run_bundle, run_unit
from workers.tasks import Bundle, GroupRecord, TaskContext, TensorSource

Document = Callable[..., dict[str, Any]]


def ready(document: dict[str, Any], folder: Path) -> tuple[Job, TaskContext]:
    prepared = prepare(parse_spec(document, where="test"), InProcessExecutor(), folder, StageClock(lambda _: None))
    return prepared, prepared.context


def test_a_group_holds_exactly_the_methods_integers(tiny_document: Document, tmp_path: Path) -> None:
    prepared, context = ready(tiny_document(), tmp_path)
    group = prepared.plan.groups[1]
    record = run_unit(context, group).record
    assert isinstance(record, GroupRecord)
    reader = TensorReader(prepared.staged.network.source)
    shards = [read_shard(prepared.registry.get_blob(level)) for level in record.levels]
    for piece in group.pieces:
        whole = reader.read(piece.parameter)[piece.start : piece.stop]
        expected = quantize_weight(whole, NestConfig(bits=(8, 4)))
        for level, (part, bits) in enumerate(zip(expected.parts, (4, 5), strict=True)):
            key = piece_key(piece.layer, piece.start, piece.stop, level)
            payload = shards[level].payload(key, count=part.numel())
            values = payload if shards[level].codec == "zstd" else unpack(payload, bits, tuple(part.shape))
            assert torch.equal(torch.from_numpy(values.copy()).reshape(part.shape), part), key
        scale = shards[0].tensor(f"{piece.layer}[{piece.start}:{piece.stop}]/scale")
        assert torch.equal(torch.from_numpy(scale), expected.qparams.scale)


def test_a_unit_done_twice_is_done_once(tiny_document: Document, tmp_path: Path) -> None:
    prepared, context = ready(tiny_document(), tmp_path)
    first = run_unit(context, prepared.plan.groups[0])
    second = run_unit(context, prepared.plan.groups[0])
    assert (first.reused, second.reused) == (False, True)
    assert second.record == first.record
    assert second.bytes_written == 0


def test_a_unit_whose_blob_is_gone_is_done_again(tiny_document: Document, tmp_path: Path) -> None:
    prepared, context = ready(tiny_document(), tmp_path)
    first = run_unit(context, prepared.plan.groups[0])
    store = prepared.registry.store
    blob = next(info.key for info in store.list("blobs/"))
    store.delete(blob)
    second = run_unit(context, prepared.plan.groups[0])
    assert not second.reused
    assert second.record == first.record
    assert store.exists(blob)


def test_a_damaged_record_names_its_key(tiny_document: Document, tmp_path: Path) -> None:
    prepared, context = ready(tiny_document(), tmp_path)
    key = Ledger(prepared.registry, context.job).unit_key("group", 0)
    prepared.registry.store.put(key, b'{"kind":"group"}', mode="create")
    with pytest.raises(WorkError, match=rf"record {key} is damaged .* delete it, and this unit is done again"):
        run_unit(context, prepared.plan.groups[0])


@pytest.mark.parametrize("misplaced", ["index", "piece", "kind"])
def test_a_record_of_another_unit_is_refused(tiny_document: Document, tmp_path: Path, misplaced: str) -> None:
    prepared, context = ready(tiny_document(), tmp_path)
    ledger, store = Ledger(prepared.registry, context.job), prepared.registry.store
    group = prepared.plan.groups[1]
    record = run_unit(context, prepared.plan.groups[0]).record
    assert isinstance(record, GroupRecord)
    if misplaced == "piece":  # the right number over another group's pieces
        record = record.model_copy(update={"index": group.index})
    if misplaced == "kind":
        record = run_unit(context, prepared.plan.base[0]).record
    store.put(ledger.unit_key("group", group.index), canonical_json(record), mode="create")
    with pytest.raises(WorkError, match=r"units/group-000001\.json is damaged \(it is of another unit\): delete it"):
        run_unit(context, group)
    store.delete(ledger.unit_key("group", group.index))
    assert not run_unit(context, group).reused


@pytest.mark.parametrize("tensor", ["layer2.0.conv1.weight", "bn1.running_var"])
def test_a_worker_looks_at_what_it_reads(
    tiny_document: Document, tiny_checkpoint: Path, tmp_path: Path, tensor: str
) -> None:
    """Whoever planned the job looked already; a worker does not rely on it."""
    from safetensors.torch import load_file, save_file

    prepared, context = ready(tiny_document(), tmp_path)
    state = load_file(tiny_checkpoint)
    state[tensor].flatten()[3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    broken = context.network.model_copy(update={"source": TensorSource(None, str(tmp_path / "nan.safetensors"))})
    bad = context.model_copy(update={"network": broken})
    with pytest.raises(CheckpointError, match=rf"nan\.safetensors: tensor '{tensor}' holds NaN"):
        run_bundle(Bundle(context=bad, units=(*prepared.plan.groups, *prepared.plan.base)))


def test_a_worker_refuses_a_checkpoint_that_is_not_the_one_that_was_digested(
    tiny_document: Document, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(tiny_checkpoint.read_bytes())
    prepared, context = ready(tiny_document(model__checkpoint=str(mine)), tmp_path)
    assert not run_unit(context, prepared.plan.groups[0]).reused
    mine.touch()
    with pytest.raises(CheckpointError, match=r"mine\.safetensors was written to while it was read; wait for its"):
        run_unit(context, prepared.plan.groups[1])


def test_a_checkpoint_that_changed_after_the_plan_names_the_layer(tiny_document: Document, tmp_path: Path) -> None:
    prepared, _ = ready(tiny_document(), tmp_path)
    piece = prepared.plan.groups[0].pieces[0]
    stale = piece.model_copy(update={"shape": (1, *piece.shape[1:])})
    with pytest.raises(CheckpointError, match=rf"Layer '{piece.layer}': '{piece.parameter}' has shape"):
        read_piece(TensorReader(prepared.staged.network.source), stale)
