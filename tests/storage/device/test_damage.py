"""Bits that rot in a cache: found before a version is relied upon, named, and brought anew."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from storage.device import Device, Event, StoreSource
from storage.device.errors import ContentError, GaveUp, NotInstalled, SourceError
from storage.layout import blob_key
from storage.manifest import Descriptor, Manifest
from storage.stores.local import LocalStore
from tests.storage.device.artifacts import digest_of, publish


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def manifest(store: LocalStore) -> Manifest:
    manifest, _ = publish(store, groups=2, shard_bytes=5_000, base_bytes=700)
    return manifest


@pytest.fixture
def device(tmp_path: Path, store: LocalStore, manifest: Manifest) -> Device:
    device = Device(tmp_path / "cache", StoreSource(store), unsigned=True)
    device.pull("net")
    return device


def rot(device: Device, blob: Descriptor, bit: int = 777) -> str:
    """Flip one bit, length and times unchanged; return the digest of what is there now."""
    path = Path(device.root) / blob_key(blob.digest)
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)
    return digest_of(bytes(data))


@pytest.mark.parametrize("seed", range(20))
def test_any_flipped_bit_of_any_blob_comes_anew(device: Device, manifest: Manifest, seed: int) -> None:
    draw = random.Random(seed)
    blob = draw.choice([*manifest.base, *(group.levels[0] for group in manifest.groups)])
    seen = rot(device, blob, draw.randrange(8 * blob.size_bytes))
    events: list[Event] = []
    device.on_event = events.append
    moved = device.pull("net") if draw.random() < 0.5 else device.upgrade("net", 0)
    line = f"{blob.digest}: the file's SHA-256 is {seen}"
    assert moved.damaged == (line,)
    assert (moved.blobs_moved, moved.received_bytes) == (1, blob.size_bytes)
    assert [event.message for event in events if event.kind == "warning"] == [f"damaged here, brought anew: {line}"]
    assert device.verify("net").whole
    assert device.pull("net").damaged == ()


def test_an_upgrade_finds_what_rotted_below_it(device: Device, manifest: Manifest) -> None:
    high = manifest.groups[1].levels[0]
    rot(device, high)
    moved = device.upgrade("net")
    assert [line.partition(":")[2].partition(":")[0] for line in moved.damaged] == [high.digest[7:]]
    assert moved.received_bytes == high.size_bytes + sum(group.levels[1].size_bytes for group in manifest.groups)
    assert device.verify("net").whole


def test_a_blob_cut_short_or_too_long_is_named(device: Device, manifest: Manifest) -> None:
    one, two = (device.blob_path(group.levels[0]) for group in manifest.groups)
    one.write_bytes(one.read_bytes()[:-1])
    two.write_bytes(two.read_bytes() + b"x")
    first, second = (group.levels[0] for group in manifest.groups)
    assert device.pull("net").damaged == (
        f"{first.digest}: 4999 bytes, expected 5000",
        f"{second.digest}: 5101 bytes, expected 5100",
    )
    assert device.verify("net").whole


def test_what_cannot_come_anew_is_gone_and_not_used(device: Device, store: LocalStore, manifest: Manifest) -> None:
    blob = manifest.groups[0].levels[0]
    rot(device, blob)
    store.delete(blob_key(blob.digest))
    with pytest.raises((SourceError, GaveUp), match=blob.digest[7:]):
        device.pull("net")
    assert device.levels("net") == ()
    assert device.verify("net").damaged == (f"{blob.digest}: missing",)


def test_a_new_version_does_not_build_on_what_rotted(device: Device, store: LocalStore, manifest: Manifest) -> None:
    rot(device, manifest.base[0])
    second, _ = publish(store, version=2, groups=2, shard_bytes=5_000, base_bytes=700, fresh=[0])
    moved = device.pull("net")
    assert moved.received_bytes == 700 + second.groups[0].levels[0].size_bytes
    assert device.verify("net").whole


def test_verify_and_rollback_look_at_the_version_to_go_back_to(device: Device, store: LocalStore) -> None:
    device.upgrade("net")
    first = device.manifest("net")
    publish(store, version=2, groups=2, shard_bytes=5_000, base_bytes=700, fresh=[0])
    device.pull("net")
    whole = device.verify("net")
    assert (whole.whole, whole.version, whole.previous, whole.blobs) == (True, 2, 1, 7)
    low = first.groups[0].levels[1]  # of version 1 alone
    line = f"{low.digest}: the file's SHA-256 is {rot(device, low)}"
    assert device.verify("net").damaged == (line,)
    with pytest.raises(ContentError) as caught:
        device.rollback("net")
    assert str(caught.value) == (
        f"net version 1 is not whole, so net stays at version 2: 1 of 5 blobs: {line}; "
        "'nestquant pull net@1' brings it anew"
    )
    assert device.manifest("net").version == 2
    assert device.pull("net", "1").damaged == (line,)
    assert device.rollback("net").version == 2
    assert device.rollback("net").version == 1


def test_a_damaged_manifest_is_a_line_of_verify(device: Device, store: LocalStore) -> None:
    publish(store, version=2, groups=2, shard_bytes=5_000, base_bytes=700, fresh=[0])
    device.pull("net")
    folder = Path(device.root) / "models/net/manifests"
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert [line.partition(":")[0] for line in device.verify("net").damaged] == ["version 2", "version 1"]
    assert all("is damaged; pull net again" in line for line in device.verify("net").damaged)
    device.pull("net", "1")
    device.pull("net", "2")
    assert device.verify("net").whole


def test_a_reader_that_met_wrong_bytes_drops_them(device: Device, manifest: Manifest) -> None:
    good, bad = (group.levels[0] for group in manifest.groups)
    seen = rot(device, bad)
    assert device.blob_path(bad).is_file()
    offline = Device(device.root)
    assert offline.drop_damaged(good) is None
    assert offline.drop_damaged(bad) == f"{bad.digest}: the file's SHA-256 is {seen}"
    with pytest.raises(NotInstalled, match=bad.digest):
        offline.blob_path(bad)
    assert offline.drop_damaged(bad) == f"{bad.digest}: missing"
    assert device.upgrade("net", 0).received_bytes == bad.size_bytes
