from __future__ import annotations

from pathlib import Path

import pytest

from storage.device import Device, Event, StoreSource
from storage.device.errors import CacheBusy, DeviceError, NotInstalled, SourceNotFound, Untrusted
from storage.errors import Corrupt
from storage.layout import blob_key, tag_key
from storage.manifest import Manifest
from storage.stores.local import LocalStore
from tests.storage.device.artifacts import build, content, digest_of, publish, put


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def device(tmp_path: Path, store: LocalStore) -> Device:
    return Device(tmp_path / "cache", StoreSource(store), unsigned=True)


def files(device: Device) -> set[str]:
    return {f"sha256:{path.name}" for path in Path(device.root).glob("blobs/sha256/*/*")}


def digests(manifest: Manifest, *levels: int) -> set[str]:
    return {group.levels[k].digest for group in manifest.groups for k in levels if k < len(group.levels)}


def base(manifest: Manifest) -> set[str]:
    return {blob.digest for blob in manifest.base}


def test_pull_brings_base_and_high_in_execution_order(store: LocalStore, device: Device) -> None:
    manifest, blobs = publish(store)
    seen: list[Event] = []
    device.on_event = seen.append
    moved = device.pull("net")
    expected = [*manifest.base, *(group.levels[0] for group in manifest.groups)]
    assert [event.path for event in seen if event.kind == "blob"] == [device.blob_path(blob) for blob in expected]
    assert files(device) == base(manifest) | digests(manifest, 0)
    assert all(device.blob_path(blob).read_bytes() == blobs[blob.digest] for blob in expected)
    total = sum(blob.size_bytes for blob in expected)
    assert (moved.received_bytes, moved.saved_bytes, moved.wasted_bytes, moved.blobs_moved) == (total, 0, 0, 4)
    assert (seen[-1].done_bytes, seen[-1].total_bytes, seen[-1].index, seen[-1].count) == (total, total, 3, 4)
    assert device.levels("net") == (0,)
    assert device.manifest("net") == manifest
    assert device.status("net").phase == "ready"


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_upgrade_moves_low_shards_only_and_downgrade_deletes_them_only(
    store: LocalStore, device: Device, levels: int
) -> None:
    manifest, _ = publish(store, levels=levels)
    device.pull("net")
    for level in range(1, levels):
        moved = device.upgrade("net", level)
        assert moved.received_bytes == sum(group.levels[level].size_bytes for group in manifest.groups)
        assert device.levels("net") == tuple(range(level + 1))
    assert files(device) == base(manifest) | digests(manifest, *range(levels))
    for level in reversed(range(levels - 1)):
        freed = device.downgrade("net", level).freed_bytes
        assert freed == sum(group.levels[level + 1].size_bytes for group in manifest.groups)
        assert files(device) == base(manifest) | digests(manifest, *range(level + 1))


def test_levels_come_one_after_the_other(store: LocalStore, device: Device) -> None:
    manifest, _ = publish(store, levels=3)
    seen: list[Event] = []
    device.on_event = seen.append
    device.pull("net", level=2)
    order = [*manifest.base, *(group.levels[level] for level in range(3) for group in manifest.groups)]
    assert [event.path for event in seen if event.kind == "blob"] == [device.blob_path(blob) for blob in order]


def test_downgrade_frees_the_previous_version_too(store: LocalStore, device: Device) -> None:
    first, _ = publish(store, version=1)
    device.pull("net", level=1)
    second, _ = publish(store, version=2, fresh=[0])
    device.pull("net")
    both = sum(shard.size_bytes for shard in (first.groups[0].levels[1], *(g.levels[1] for g in second.groups)))
    assert device.downgrade("net").freed_bytes == both
    assert device.rollback("net").level == 0
    assert device.verify("net").whole


def test_a_blob_that_was_cut_is_not_held(store: LocalStore, device: Device) -> None:
    manifest, _ = publish(store)
    device.pull("net")
    shard = manifest.groups[1].levels[0]
    path = device.blob_path(shard)
    path.write_bytes(path.read_bytes()[:-1])
    assert device.levels("net") == ()
    with pytest.raises(NotInstalled, match=shard.digest):
        device.blob_path(shard)
    assert device.pull("net").received_bytes == shard.size_bytes
    assert device.levels("net") == (0,)


def test_groups_of_unequal_depth(store: LocalStore, device: Device) -> None:
    groups = [[content("a", 100)], [content("b0", 90), content("b1", 80), content("b2", 70)]]
    manifest, blobs = build("net", 1, b"base", groups)
    put(store, manifest, blobs)
    device.pull("net")
    assert device.upgrade("net", 1).received_bytes == 80
    assert device.upgrade("net").received_bytes == 70
    assert device.levels("net") == (0, 1, 2)


def test_a_new_version_moves_what_changed_and_rolls_back_offline(store: LocalStore, device: Device) -> None:
    first, _ = publish(store, version=1)
    device.pull("net")
    device.upgrade("net")
    second, _ = publish(store, version=2, fresh=[1])
    moved = device.pull("net")
    assert (moved.version, moved.level) == (2, 1)
    assert moved.received_bytes == sum(shard.size_bytes for shard in second.groups[1].levels)
    assert moved.saved_bytes == 5_000 + sum(shard.size_bytes for g in (0, 2) for shard in second.groups[g].levels)
    offline = Device(device.root)
    assert offline.rollback("net").version == 1
    assert offline.verify("net").whole
    assert offline.manifest("net") == first
    assert offline.rollback("net").version == 2
    assert device.pull("net").received_bytes == 0


def test_the_old_version_serves_until_the_new_one_is_whole(store: LocalStore, device: Device) -> None:
    publish(store, version=1)
    device.pull("net")
    second, _ = publish(store, version=2, fresh=[2])
    gone = second.groups[2].levels[0]
    store.delete(blob_key(gone.digest))
    with pytest.raises(SourceNotFound, match=gone.digest[7:]):
        device.pull("net")
    status = device.status("net")
    assert status.phase == "failed"
    assert status.state.current is not None
    assert status.state.current.version == 1
    assert status.state.failed is not None
    assert gone.digest[7:] in status.state.failed
    assert device.verify("net").whole
    store.put(blob_key(gone.digest), content("2/0/2", gone.size_bytes), mode="create")
    assert device.pull("net").received_bytes == gone.size_bytes
    assert device.status("net").phase == "ready"


def test_the_version_before_last_is_swept(store: LocalStore, device: Device) -> None:
    for version in (1, 2, 3):
        publish(store, version=version, fresh=[0, 1, 2])
        device.pull("net")
    two, three = (device.resolve("net", str(version)).manifest for version in (2, 3))
    assert files(device) == base(two) | digests(two, 0) | digests(three, 0)
    assert len(list((Path(device.root) / "models/net/manifests").iterdir())) == 2


def test_models_share_blobs_and_give_them_up_one_by_one(store: LocalStore, device: Device) -> None:
    first, _ = publish(store, "one")
    second, _ = publish(store, "two", fresh=[0])
    device.pull("one", level=1)
    moved = device.pull("two", level=1)
    assert moved.saved_bytes == sum(first.groups[g].levels[k].size_bytes for g in (1, 2) for k in range(2))
    assert moved.received_bytes == 5_000 + sum(shard.size_bytes for shard in second.groups[0].levels)
    device.downgrade("one")
    assert digests(second, 1) <= files(device)
    assert device.remove("one") == 5_000 + first.groups[0].levels[0].size_bytes
    assert device.verify("two").whole
    assert device.names() == ["two"]
    device.remove("two")
    assert files(device) == set()


def test_verify_names_what_is_damaged_and_pull_mends_it(store: LocalStore, device: Device) -> None:
    manifest, _ = publish(store)
    device.pull("net")
    flipped, missing, cut = (device.blob_path(group.levels[0]) for group in manifest.groups)
    data = bytearray(flipped.read_bytes())
    data[777] ^= 4
    flipped.write_bytes(data)
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    seen = device.verify("net", discard=True)
    first, second, third = (group.levels[0] for group in manifest.groups)
    assert seen.damaged == (
        f"{first.digest}: the file's SHA-256 is {digest_of(bytes(data))}",
        f"{second.digest}: missing",
        f"{third.digest}: {third.size_bytes - 1} bytes, expected {third.size_bytes}",
    )
    assert device.levels("net") == ()
    assert device.pull("net").received_bytes == sum(group.levels[0].size_bytes for group in manifest.groups)
    assert device.verify("net").whole


def test_what_is_not_there_is_said(store: LocalStore, device: Device) -> None:
    publish(store)
    with pytest.raises(NotInstalled, match="net is not in"):
        device.upgrade("net")
    with pytest.raises(SourceNotFound, match="net has no tag 'stable'"):
        device.pull("net", "stable")
    with pytest.raises(SourceNotFound, match="net has no version 9"):
        device.pull("net", "9")
    device.pull("net")
    with pytest.raises(DeviceError, match="levels 0 to 1, not 2"):
        device.upgrade("net", 2)
    with pytest.raises(NotInstalled, match="no earlier version"):
        device.rollback("net")
    with pytest.raises(DeviceError, match="no source was given"):
        Device(device.root, unsigned=True).pull("net")
    assert device.status("other").phase == "absent"


def test_unsigned_must_be_said(store: LocalStore, tmp_path: Path) -> None:
    publish(store)
    with pytest.raises(Untrusted, match="no root of trust"):
        Device(tmp_path / "cache", StoreSource(store)).pull("net")


def test_a_tag_that_contradicts_its_manifest(store: LocalStore, device: Device) -> None:
    publish(store)
    store.put(
        tag_key("net", "latest"), b'{"digest":"sha256:%s","name":"net","version":1}' % (b"0" * 64), mode="overwrite"
    )
    with pytest.raises(Corrupt, match="expected sha256:000"):
        device.pull("net")


def test_one_writer_at_a_time(store: LocalStore, device: Device) -> None:
    publish(store)
    other = Device(device.root, device.source, unsigned=True, lock_timeout_s=0.05)

    def intrude(_: Event) -> None:
        with pytest.raises(CacheBusy, match=r"another process works on .*; waited 0.05 s"):
            other.pull("net")

    device.on_event = intrude
    device.pull("net")
    assert other.pull("net").received_bytes == 0
