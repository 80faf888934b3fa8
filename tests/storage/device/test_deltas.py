"""Updates by delta: as few bytes as there are, the very blobs in the end, the whole shard wherever a delta fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.agent.current import current_of
from storage.delta import canonical_bytes, make_delta
from storage.device import Device, Event, Retry, StoreSource
from storage.device.cache import Cache, read_blob
from storage.digest import digest_bytes
from storage.errors import InvalidManifest, NotFound
from storage.layout import blob_key
from storage.manifest import (
    MEDIA_TYPE_DELTA,
    MEDIA_TYPE_SHARD,
    CanonicalForm,
    DeltaRecord,
    Manifest,
    canonical_json,
    parse_manifest,
    piece_key,
)
from storage.registry import Registry
from storage.retention import delete_version, fsck, gc
from storage.shard import read_shard
from storage.stores.local import LocalStore
from tests.conftest import ROOT
from tests.storage.device.signed import Publisher
from tests.storage.device.updates import draft, publish


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def device(tmp_path: Path, store: LocalStore) -> Device:
    """A device that runs version 1."""
    publish(store, 0)
    device = Device(
        tmp_path / "cache", StoreSource(store), unsigned=True, retry=Retry(attempts=2, base_s=0.001, cap_s=0.002)
    )
    device.pull("net")
    return device


def files(device: Device) -> set[str]:
    return {f"sha256:{path.name}" for path in Path(device.root).glob("blobs/sha256/*/*")}


def delta_bytes(manifest: Manifest, *levels: int) -> int:
    """Return the bytes of the deltas of the base and of these levels."""
    results = {blob.digest for blob in manifest.base}
    results |= {group.levels[level].digest for level in levels for group in manifest.groups}
    return sum(delta.descriptor.size_bytes for delta in manifest.deltas if delta.of in results)


def test_an_update_moves_its_deltas_and_leaves_the_very_shards(device: Device, store: LocalStore) -> None:
    first = device.manifest("net")
    second = publish(store, 1, sources=(1,))
    assert second.schema_version == 4
    assert len(second.deltas) == 5
    moved = device.pull("net")
    assert (moved.version, moved.deltas, moved.blobs_moved) == (2, 3, 3)
    assert moved.received_bytes == delta_bytes(second, 0)
    whole_bytes = sum(blob.size_bytes for blob in (*second.base, *(group.levels[0] for group in second.groups)))
    assert moved.spared_bytes == whole_bytes - moved.received_bytes
    assert moved.received_bytes < whole_bytes / 10
    here = [*first.base, *second.base, *(group.levels[0] for one in (first, second) for group in one.groups)]
    assert files(device) == {blob.digest for blob in here}
    assert device.verify("net").whole
    assert not list(Path(device.root).glob("staging/*"))
    offline = Device(device.root)
    assert offline.rollback("net").version == 1
    assert offline.rollback("net").version == 2
    assert device.pull("net").received_bytes == 0


def test_low_shards_come_from_the_old_low_ones_where_those_are_here(device: Device, store: LocalStore) -> None:
    device.upgrade("net")
    second = publish(store, 1, sources=(1,))
    moved = device.pull("net")
    assert (moved.level, moved.deltas, moved.received_bytes) == (1, 5, delta_bytes(second, 0, 1))
    assert device.verify("net").whole


def test_an_upgrade_without_the_old_low_shards_takes_them_whole_and_says_why(device: Device, store: LocalStore) -> None:
    second = publish(store, 1, sources=(1,))
    device.pull("net")
    moved = device.upgrade("net")
    lows = [group.levels[1] for group in second.groups]
    assert (moved.deltas, moved.received_bytes) == (0, sum(low.size_bytes for low in lows))
    assert moved.ways == tuple(
        f"{low.digest}: whole, {low.size_bytes} bytes: nothing is here that a delta starts from" for low in lows
    )


def test_every_way_is_a_line_that_says_why(device: Device, store: LocalStore) -> None:
    first, second = device.manifest("net"), publish(store, 1, sources=(1,))
    base, *highs = device.pull("net").ways
    sizes = {delta.of: delta.descriptor.size_bytes for delta in second.deltas}
    high, old = second.groups[0].levels[0], first.groups[0].levels[0]
    assert highs[0] == (
        f"{high.digest}: 1 delta from {old.digest}, {sizes[high.digest]} bytes in the place of {high.size_bytes}"
    )
    assert base.startswith(f"{second.base[0].digest}: 1 delta from {first.base[0].digest}, ")
    third = publish(store, 2)
    assert device.pull("net").ways[1] == (
        f"{third.groups[0].levels[0].digest}: whole, {third.groups[0].levels[0].size_bytes} bytes: no delta makes it"
    )


def agent_files(device: Device, manifest: Manifest) -> list[str]:
    """Return the files that an agent names to an engine at full-bit."""
    cache = Cache(device.root)
    installed = cache.state("net").current
    assert installed is not None
    return list(current_of(cache, installed, manifest, 1).files.values())


def test_another_zstd_than_the_publishers_keeps_the_canonical_form(device: Device, store: LocalStore) -> None:
    """Frames of another level, as another release of the library writes them: this machine cannot make those bytes."""
    device.upgrade("net")
    second = publish(store, 1, sources=(1,), level=5)
    moved = device.pull("net")
    assert (moved.deltas, moved.received_bytes) == (5, delta_bytes(second, 0, 1))
    shards = [shard for group in second.groups for shard in group.levels]
    assert not files(device) & {shard.digest for shard in shards}
    assert {shard.canonical.digest for shard in shards if shard.canonical} < files(device)
    assert device.levels("net") == (0, 1)
    assert device.verify("net").whole
    key = piece_key("conv1", 0, 32, 0)
    high = second.groups[1].levels[0]
    ours, theirs = (
        read_shard(data).payload(key, count=32 * 16 * 9)
        for data in (device.blob_path(high), store.get(blob_key(high.digest)))
    )
    assert np.array_equal(ours, theirs)
    assert high.canonical is not None
    assert digest_bytes(read_blob(device.blob_path(high), high)) == high.canonical.digest
    assert all(Path(file).is_file() for file in agent_files(device, second))
    assert device.pull("net").received_bytes == 0
    assert device.rollback("net").version == 1
    assert device.rollback("net").version == 2
    # the next update starts from the canonical form, and what rots in it comes anew
    third = publish(store, 2, sources=(2,), level=5)
    assert device.pull("net").received_bytes == delta_bytes(third, 0, 1)
    low = third.groups[0].levels[1]
    path = device.blob_path(low)
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    assert len(device.verify("net").damaged) == 1
    healed = device.pull("net")
    assert len(healed.damaged) == 1
    assert healed.received_bytes <= low.size_bytes
    assert device.verify("net").whole
    device.downgrade("net")
    assert device.levels("net") == (0,)
    lows = {group.levels[1].canonical.digest for group in third.groups if group.levels[1].canonical}
    assert len(lows) == 2
    assert not lows & files(device)


def _delta_missing(device: Device, store: LocalStore, second: Manifest, of: str) -> None:
    store.delete(blob_key(next(delta.descriptor.digest for delta in second.deltas if delta.of == of)))


def _delta_rotten(device: Device, store: LocalStore, second: Manifest, of: str) -> None:
    key = blob_key(next(delta.descriptor.digest for delta in second.deltas if delta.of == of))
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 4
    store.put(key, bytes(data), mode="overwrite")


def _delta_cut(device: Device, store: LocalStore, second: Manifest, of: str) -> None:
    key = blob_key(next(delta.descriptor.digest for delta in second.deltas if delta.of == of))
    store.put(key, store.get(key)[:-3], mode="overwrite")


def _source_rotten(device: Device, store: LocalStore, second: Manifest, of: str) -> None:
    path = _source(device, second, of)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def _source_header_rotten(device: Device, store: LocalStore, second: Manifest, of: str) -> None:
    path = _source(device, second, of)
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def _source_gone(device: Device, store: LocalStore, second: Manifest, of: str) -> None:
    _source(device, second, of).unlink()


def _source_cut(device: Device, store: LocalStore, second: Manifest, of: str) -> None:
    path = _source(device, second, of)
    path.write_bytes(path.read_bytes()[:-1])


def _source(device: Device, second: Manifest, of: str) -> Path:
    return Cache(Path(device.root)).blob_path(next(delta.source for delta in second.deltas if delta.of == of))


@pytest.mark.parametrize(
    "damage",
    [
        _delta_missing,
        _delta_rotten,
        _delta_cut,
        _source_rotten,
        _source_header_rotten,
        _source_gone,
        _source_cut,
    ],
)
@pytest.mark.parametrize("what", ["base", "high"])
def test_whatever_is_wrong_the_whole_shard_comes(
    device: Device, store: LocalStore, damage: Callable[[Device, LocalStore, Manifest, str], None], what: str
) -> None:
    second = publish(store, 1, sources=(1,))
    blob = second.base[0] if what == "base" else second.groups[1].levels[0]
    damage(device, store, second, blob.digest)
    events: list[Event] = []
    device.on_event = events.append
    moved = device.pull("net")
    assert (moved.version, moved.deltas, moved.blobs_moved) == (2, 2, 3)
    for one in (*second.base, *(group.levels[0] for group in second.groups)):
        assert digest_bytes(device.blob_path(one).read_bytes()) == one.digest
    others = sum(delta.descriptor.size_bytes for delta in second.deltas if delta.of != blob.digest)
    assert moved.received_bytes >= blob.size_bytes + others - delta_bytes(second, 0, 1) + delta_bytes(second, 0)
    (line,) = (line for line in moved.ways if line.startswith(blob.digest))
    assert line.startswith(f"{blob.digest}: whole, {blob.size_bytes} bytes: ")
    noticed = [event.message for event in events if event.kind == "warning"]
    if damage in (_source_gone, _source_cut):  # looked at before anything moves
        assert "nothing is here that a delta starts from" in line
        assert noticed == []
    else:
        assert [text.partition(",")[0] for text in noticed] == [f"{blob.digest} comes whole"]
    assert not {delta.descriptor.digest for delta in second.deltas} & files(device)
    assert not list(Path(device.root).glob("staging/*"))


def test_a_delta_that_makes_something_else_is_not_believed(device: Device, store: LocalStore) -> None:
    """Its own digest is right, and signed as any: what it makes is compared, not it."""
    registry, first = Registry(store), device.manifest("net")
    second = draft(registry, 1)
    old, new = first.groups[0].levels[0], second.groups[0].levels[0]
    forms = [canonical_bytes(registry.get_blob(blob), MEDIA_TYPE_SHARD) for blob in (old, new)]
    wrong = bytearray(forms[1])
    wrong[-1] ^= 1
    delta = make_delta(forms[0], wrong)
    assert delta is not None
    record = DeltaRecord(of=new.digest, source=old.digest, descriptor=registry.put_blob(delta, MEDIA_TYPE_DELTA))
    form = CanonicalForm(digest=digest_bytes(forms[1]), size_bytes=len(forms[1]))
    registry.tag("net", "latest", registry.publish(second.with_deltas((record,), {new.digest: form})).version)
    moved = device.pull("net")
    assert (moved.version, moved.deltas) == (2, 0)
    assert f"its delta does not do: it makes {len(wrong)} bytes with {digest_bytes(wrong)}" in " ".join(moved.ways)
    assert device.verify("net").whole


def test_bytes_of_the_whole_shard_that_are_staged_count(device: Device, store: LocalStore) -> None:
    second = publish(store, 1, sources=(1,))
    high = second.groups[0].levels[0]
    part = Cache(Path(device.root)).part_path(high.digest)
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(store.get(blob_key(high.digest))[:-10])
    moved = device.pull("net")
    assert (moved.deltas, moved.resumed_bytes) == (2, high.size_bytes - 10)
    assert f"{high.digest}: whole, 10 bytes: no more than the deltas take" in moved.ways
    assert device.verify("net").whole


def test_a_chain_has_at_most_three_deltas(tmp_path: Path, store: LocalStore) -> None:
    devices = []
    for step in range(5):
        publish(store, step, sources=(step,) if step else ())
        if step < 2:
            device = Device(tmp_path / f"cache{step}", StoreSource(store), unsigned=True)
            device.pull("net")
            devices.append(device)
    newest = Registry(store).resolve("net", 5).manifest
    assert len(newest.deltas) == 5 * 3
    far, near = (device.pull("net") for device in devices)
    assert (far.deltas, near.deltas) == (0, 3)
    assert " 3 deltas from " in near.ways[0]
    assert near.received_bytes < far.received_bytes / 4
    assert all(device.verify("net").whole for device in devices)


def test_updates_one_after_the_other_make_neither_cache_nor_manifest_grow(device: Device, store: LocalStore) -> None:
    figures = []
    for step in range(1, 13):
        manifest = publish(store, step, sources=(step,))
        moved = device.pull("net")
        assert (moved.version, moved.deltas) == (step + 1, 3)
        sizes = sum(path.stat().st_size for path in Path(device.root).rglob("*") if path.is_file())
        count = sum(path.is_file() for path in Path(device.root).rglob("*"))
        figures.append((len(manifest.deltas), sizes, count))
    assert {count for count, _, _ in figures[2:]} == {15}
    assert max(sizes for _, sizes, _ in figures[3:]) < 1.02 * min(sizes for _, sizes, _ in figures[3:])
    assert len({count for _, _, count in figures[1:]}) == 1


def test_a_delta_that_is_no_fifth_shorter_is_not_published(store: LocalStore) -> None:
    publish(store, 0)
    far = publish(store, 60, sources=(1,), share=1.0)
    shards = {shard.digest for group in far.groups for shard in group.levels}
    assert not {delta.of for delta in far.deltas} & shards
    other = publish(store, 1, sources=(1,), rows=33)
    assert not {delta.of for delta in other.deltas} & {shard.digest for group in other.groups for shard in group.levels}


def test_a_device_without_numpy_or_zstandard_takes_the_whole_version(device: Device, store: LocalStore) -> None:
    second = publish(store, 1, sources=(1,))
    child = (
        "import sys, json; sys.modules.update(numpy=None, zstandard=None)\n"
        "from storage.device import Device, StoreSource; from storage.stores.local import LocalStore\n"
        "from pathlib import Path\n"
        "moved = Device(Path(sys.argv[1]), StoreSource(LocalStore(Path(sys.argv[2]))), unsigned=True).pull('net')\n"
        "print(json.dumps([moved.received_bytes, moved.deltas, moved.ways]))"
    )
    argv = [sys.executable, "-c", child, str(device.root), str(store.root)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    received, deltas, ways = json.loads(done.stdout)
    whole = [*second.base, *(group.levels[0] for group in second.groups)]
    assert (received, deltas) == (sum(blob.size_bytes for blob in whole), 0)
    assert all("deltas need numpy and zstandard, which this device has not" in line for line in ways)


def test_a_signed_version_comes_by_deltas(publisher: Publisher, tmp_path: Path) -> None:
    publish(publisher.store, 0)
    publisher.sign(versions=[1], tags={"latest": 1})
    device = publisher.device(tmp_path / "cache")
    device.pull("net")
    publish(publisher.store, 1, sources=(1,))
    publisher.sign(versions=[2], tags={"latest": 2})
    moved = device.pull("net")
    assert (moved.version, moved.signed, moved.deltas) == (2, True, 3)


def test_gc_keeps_deltas_as_long_as_a_version_names_them_and_fsck_reads_them(store: LocalStore) -> None:
    publish(store, 0)
    second = publish(store, 1, sources=(1,))
    keys = [blob_key(delta.descriptor.digest) for delta in second.deltas]
    assert gc(store, grace_s=0, dry_run=False).removed == ()
    assert fsck(store).problems == ()
    assert fsck(store).blobs == len(second.named_blobs()) + len(second.descriptors())
    store.put(keys[0], b"rot", mode="overwrite")
    (problem,) = fsck(store).problems
    assert keys[0] in problem
    delete_version(store, "net", 2)
    gc(store, grace_s=0, dry_run=False)
    for key in keys:
        with pytest.raises(NotFound):
            store.head(key)


def test_a_version_is_not_published_while_a_delta_is_missing(store: LocalStore) -> None:
    publish(store, 0)
    registry = Registry(store)
    second = publish(store, 1, sources=(1,))
    store.delete(blob_key(second.deltas[0].descriptor.digest))
    with pytest.raises(NotFound):
        registry.publish(second.model_copy(update={"tool_versions": {"nestquant": "2"}}))


def test_a_manifest_without_deltas_keeps_its_schema_and_bytes(store: LocalStore) -> None:
    plain = draft(Registry(store), 1)
    publish(store, 0)
    second = publish(store, 1, sources=(1,))
    assert canonical_json(second.with_deltas((), {}).model_copy(update={"version": 1})) == canonical_json(plain)
    assert b"canonical" not in canonical_json(plain)
    assert b"deltas" not in canonical_json(plain)
    raw = canonical_json(second)
    assert canonical_json(parse_manifest(raw, name="net", version=2)) == raw
    assert b'"from":"sha256:' in raw


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda deltas: [*deltas, deltas[0]], "stands twice"),
        (lambda deltas: deltas[:1], "has a canonical form and no delta"),
        (lambda deltas: [{**deltas[0], "from": deltas[0]["of"]}, *deltas], "a delta leads from a blob to itself"),
        (
            lambda deltas: [*deltas, *({**deltas[0], "from": f"sha256:{n:064x}"} for n in range(8))],
            "9 deltas of sha256:",
        ),
        (lambda deltas: [{**deltas[0], "extra": 1}, *deltas[1:]], "field deltas.0.extra"),
        (lambda deltas: [], "schema_version is 4 with 0 engines, no labels; expected 1"),
    ],
)
def test_deltas_that_make_no_sense_are_refused(
    store: LocalStore, change: Callable[[list[dict[str, object]]], object], message: str
) -> None:
    publish(store, 0)
    document = json.loads(canonical_json(publish(store, 1, sources=(1,))))
    document["deltas"] = change(document["deltas"])
    with pytest.raises(InvalidManifest, match=message):
        parse_manifest(canonical_json(document), name="net", version=2)
