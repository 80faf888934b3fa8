"""Offline bundles: verified as online, resumed, bounded, and refused by name where they are not what they should be."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from storage.device import Device, Retry
from storage.device.bundle import BundleSource, write_bundle
from storage.device.errors import DeviceError, GaveUp, SourceError, SourceNotFound, Untrusted
from storage.device.report import Event
from storage.errors import Corrupt
from storage.layout import blob_key
from storage.signing.keys import SigningError
from storage.signing.metadata import lasting_timestamp
from storage.stores.local import LocalStore
from tests.storage.device.artifacts import publish
from tests.storage.device.signed import Publisher

SHARD_BYTES = 1_500_000


@pytest.fixture
def signed(publisher: Publisher) -> Publisher:
    """Versions 1 and 2 of ``net``, the first of them signed as ``latest``."""
    for version in (1, 2):
        publish(publisher.store, version=version, fresh=[0], shard_bytes=SHARD_BYTES)
    publisher.sign(tags={"latest": 1})
    return publisher


def offline(publisher: Publisher, folder: Path, bundle: Path) -> Device:
    retry = Retry(attempts=2, base_s=0.001)
    return Device(folder, BundleSource(bundle), root_of_trust=publisher.anchor, retry=retry)


def test_a_bundle_is_pulled_and_upgraded_as_a_store_is(signed: Publisher, tmp_path: Path) -> None:
    written = write_bundle(signed.store, "net", "1", tmp_path / "usb.tar", level=None)
    assert (written.signed, written.contents.level) == (True, 1)
    assert written.size_bytes == (tmp_path / "usb.tar").stat().st_size
    online, stick = signed.device(tmp_path / "online"), offline(signed, tmp_path / "stick", tmp_path / "usb.tar")
    assert stick.pull("net", "1") == online.pull("net", "1")
    assert stick.upgrade("net") == online.upgrade("net")
    assert stick.verify("net").whole
    assert stick.pull("net", "latest").signed, "the signed tag is in it, too"
    with tarfile.open(tmp_path / "usb.tar") as tar:  # any tar reads it
        assert tar.getnames()[0] == "bundle.json"
    write_bundle(signed.store, "net", "1", tmp_path / "again.tar", level=None)
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "usb.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.part")) == []


def test_a_bundle_of_the_high_part_says_what_it_lacks(signed: Publisher, tmp_path: Path) -> None:
    write_bundle(signed.store, "net", "1", tmp_path / "usb.tar")
    stick = offline(signed, tmp_path / "cache", tmp_path / "usb.tar")
    assert stick.pull("net", "1").level == 0
    with pytest.raises(SourceNotFound, match=r"usb\.tar has no blobs/sha256/.*; was it made for this version"):
        stick.upgrade("net")
    with pytest.raises(DeviceError, match="net version 1 has levels 0 to 1, not 2"):
        write_bundle(signed.store, "net", "1", tmp_path / "x.tar", level=2)
    with pytest.raises(SigningError, match="net is signed, and version 2 is not; sign it, then bundle it"):
        write_bundle(signed.store, "net", "2", tmp_path / "x.tar")


def test_a_stick_that_is_pulled_in_mid_shard_costs_no_byte(signed: Publisher, tmp_path: Path) -> None:
    stick = tmp_path / "usb.tar"
    write_bundle(signed.store, "net", "1", stick)
    whole = stick.read_bytes()
    device = offline(signed, tmp_path / "cache", stick)

    def pulled(event: Event) -> None:
        if event.kind == "bytes" and event.index == 2 and event.done_bytes > 1.2 * SHARD_BYTES:
            os.truncate(stick, len(whole) // 2)

    device.on_event = pulled
    with pytest.raises(SourceError, match=r"usb\.tar is no whole bundle: it ends within blobs/sha256/"):
        device.pull("net", "1")
    with pytest.raises(SourceError, match=r"does not fit: .* copy it anew"):
        offline(signed, tmp_path / "cache", stick)
    stick.unlink()
    with pytest.raises(SourceError, match="No such file or directory; with the bundle in place again, the"):
        offline(signed, tmp_path / "cache", stick)
    stick.write_bytes(whole)
    moved = offline(signed, tmp_path / "cache", stick).pull("net", "1")
    total = sum(blob.size_bytes for blob in device.manifest("net").descriptors()[:4])
    assert moved.resumed_bytes > 0
    assert moved.wasted_bytes == 0
    assert moved.received_bytes + moved.resumed_bytes + moved.saved_bytes == total


def test_a_bundle_older_than_what_was_trusted_is_refused(signed: Publisher, tmp_path: Path) -> None:
    write_bundle(signed.store, "net", "1", tmp_path / "old.tar")
    time.sleep(0.01)
    signed.sign(tags={"latest": 2})
    online = signed.device(tmp_path / "cache")
    assert online.pull("net").version == 2
    for ref in ("1", "latest"):
        with pytest.raises(Untrusted, match="the source offers older metadata than was trusted before"):
            offline(signed, tmp_path / "cache", tmp_path / "old.tar").pull("net", ref)
    assert online.status("net").state.current is not None
    assert online.levels("net") == (0,)


def test_a_bundle_counts_as_long_as_it_is_signed_for(signed: Publisher, tmp_path: Path) -> None:
    write_bundle(signed.store, "net", "1", tmp_path / "week.tar")
    lasting = lasting_timestamp(signed.store, "net", [signed.online], timedelta(days=90))
    write_bundle(signed.store, "net", "1", tmp_path / "season.tar", timestamp=lasting)
    with time_machine.travel(time.time() + 30 * 86_400):
        with pytest.raises(Untrusted, match="what is signed has expired"):
            offline(signed, tmp_path / "a", tmp_path / "week.tar").pull("net", "1")
        device = offline(signed, tmp_path / "b", tmp_path / "season.tar")
        assert device.pull("net", "1").signed
    assert signed.device(tmp_path / "b").pull("net").version == 1, "the store's own word is taken again"


def test_a_changed_bundle_is_found_out(signed: Publisher, tmp_path: Path) -> None:
    write_bundle(signed.store, "net", "1", tmp_path / "usb.tar")
    whole = bytearray((tmp_path / "usb.tar").read_bytes())
    places = BundleSource(tmp_path / "usb.tar")._members
    for key, (offset, _) in places.items():
        spoiled = bytearray(whole)
        spoiled[offset + 40] ^= 1
        (tmp_path / "spoiled.tar").write_bytes(spoiled)
        device = offline(signed, tmp_path / f"cache-{offset}", tmp_path / "spoiled.tar")
        if key in ("bundle.json", "trust/1.root.json"):  # the anchor takes the first root's place
            assert device.pull("net", "1").signed, "asked for by nobody who trusts"
        else:
            with pytest.raises((Untrusted, GaveUp)):
                device.pull("net", "1")
            assert device.status("net").state.current is None


def test_what_rotted_in_the_store_goes_into_no_bundle(signed: Publisher, tmp_path: Path) -> None:
    blob = signed.device(tmp_path / "x").resolve("net").manifest.groups[1].levels[0]
    path = signed.store.root / blob_key(blob.digest)
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Corrupt, match=f"{blob_key(blob.digest)}: expected {blob.size_bytes} bytes with {blob.digest}"):
        write_bundle(signed.store, "net", "1", tmp_path / "usb.tar")
    assert list(tmp_path.glob("usb*")) == []


def test_a_store_that_nobody_signs_makes_a_bundle_by_its_word(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store)
    assert not write_bundle(store, "net", "latest", tmp_path / "usb.tar", level=None).signed
    device = Device(tmp_path / "cache", BundleSource(tmp_path / "usb.tar"), unsigned=True)
    assert device.pull("net", "latest").version == 1
    assert device.upgrade("net").level == 1
    trusting = Device(tmp_path / "other", BundleSource(tmp_path / "usb.tar"), root_of_trust=b"{}")
    with pytest.raises(Untrusted):
        trusting.pull("net")


def member(name: str, data: bytes = b"", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


HOSTILE = {
    "empty": b"",
    "text": b"this is no tar" * 100,
    "link": member("models/a", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "folder": member("models", type=tarfile.DIRTYPE),
    "device": member("models/a", type=tarfile.CHRTYPE),
    "way out": member("../a", b"x"),
    "absolute": member("/etc/passwd", b"x"),
    "capital": member("Models/a", b"x"),
    "twice": member("models/a", b"x") + member("models/a", b"y"),
    "pax": member("models/a", b"12 path=b/c\n", type=tarfile.XHDTYPE),
    "long name": member("models/" + "a" * 180, b"x"),
    "sparse": member("models/a", b"x", type=tarfile.GNUTYPE_SPARSE),
    "beyond": member("models/a", size=10**6),
    "far beyond": member("models/a", size=1 << 60),
    "no end": member("models/a", b"x"),
    "cut": member("models/a", b"x" * 600)[:-1],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bundles_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "usb.tar").write_bytes(HOSTILE[kind])
    with pytest.raises(SourceError) as caught:
        BundleSource(tmp_path / "usb.tar")
    assert str(caught.value).startswith(f"{tmp_path / 'usb.tar'} is no whole bundle: ")
    assert str(caught.value).endswith("; copy it anew")
    assert len(str(caught.value).splitlines()) == 1


@given(raw=st.binary(max_size=3000), where=st.integers(0, 5000), spoil=st.binary(min_size=1, max_size=20))
def test_any_bytes_are_a_bundle_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, where: int, spoil: bytes
) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("bundle.json")
        info.size = len(raw)
        tar.addfile(info, io.BytesIO(raw))
    changed = bytearray(whole.getvalue())
    changed[where : where + len(spoil)] = spoil
    path = tmp_path_factory.getbasetemp() / "any.tar"
    for data in (raw, bytes(changed)):
        path.write_bytes(data)
        try:
            source = BundleSource(path)
            with source.open("bundle.json") as body:
                assert len(b"".join(body.chunks)) == body.total_bytes
            source.contents()
        except SourceError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 - either outcome is right


def test_contents_tell_what_a_bundle_holds(signed: Publisher, tmp_path: Path) -> None:
    write_bundle(signed.store, "net", "1", tmp_path / "usb.tar", level=1)
    assert json.loads(BundleSource(tmp_path / "usb.tar").contents().model_dump_json()) == {
        "schema_version": 1,
        "name": "net",
        "version": 1,
        "digest": signed.device(tmp_path / "x").resolve("net").digest,
        "level": 1,
    }
