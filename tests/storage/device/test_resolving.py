"""From a reference to a version: digests, versions taken back, and the step from signed to unsigned."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from storage.device import Device, Event, StoreSource, open_source
from storage.device.errors import SourceNotFound, Untrusted
from storage.errors import BadKey, VersionDeleted
from storage.layout import blob_key, manifest_key, tag_key
from storage.retention import delete_version
from storage.signing.metadata import Lives, sign, trust_key
from storage.stores.local import LocalStore
from tests.servers.process import free_port, running, wait_for_port
from tests.storage.device.artifacts import digest_of, publish
from tests.storage.device.signed import Publisher


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    for version in (1, 2, 3):
        publish(store, version=version, fresh=[0])
    return store


@pytest.fixture
def device(tmp_path: Path, store: LocalStore) -> Device:
    return Device(tmp_path / "cache", StoreSource(store), unsigned=True)


@pytest.fixture
def signed(publisher: Publisher, tmp_path: Path) -> Device:
    for version in (1, 2):
        publish(publisher.store, version=version, fresh=[0])
    publisher.sign(tags={"latest": 1}, versions=[2])
    device = publisher.device(tmp_path / "signed")
    device.pull("net")
    return device


def digest(store: LocalStore, version: int, name: str = "net") -> str:
    return digest_of(store.get(manifest_key(name, version)))


@pytest.mark.parametrize("tagged", [1, 2, 3, None])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_version_by_its_digest(device: Device, store: LocalStore, version: int, tagged: int | None) -> None:
    wanted = digest(store, version)
    store.delete(tag_key("net", "latest"))
    if tagged is not None:
        tag = b'{"digest":"%s","name":"net","version":%d}' % (digest(store, tagged).encode(), tagged)
        store.put(tag_key("net", "latest"), tag, mode="create")
    moved = device.pull("net", wanted)
    assert (moved.version, moved.digest) == (version, wanted)
    assert device.verify("net").whole


def test_a_digest_that_is_not_there(device: Device, store: LocalStore) -> None:
    with pytest.raises(SourceNotFound, match="net has no version with the digest sha256:0000"):
        device.pull("net", f"sha256:{'0' * 64}")
    with pytest.raises(BadKey, match="expected 'sha256:' and 64 lower-case hex digits"):
        device.pull("net", "sha256:abc")
    gone = digest(store, 2)
    delete_version(store, "net", 2)
    with pytest.raises(VersionDeleted, match=r"net version 2, of the digest .* was deleted; choose another"):
        device.pull("net", gone)


def test_a_digest_by_an_index_that_names_one_version(tmp_path: Path, store: LocalStore) -> None:
    """Presigned URLs of version 2 and of the tag, which says 3: the numbers in between are simply not there."""
    manifest = Device(tmp_path / "x", StoreSource(store), unsigned=True).resolve("net", "2").manifest
    keys = [manifest_key("net", 2), tag_key("net", "latest"), *(blob_key(one.digest) for one in manifest.descriptors())]
    port, log, index = free_port(), tmp_path / "log", tmp_path / "index.json"
    argv = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(store.root), str(port)]
    index.write_text(json.dumps({"urls": {key: f"http://127.0.0.1:{port}/{key}" for key in keys}}))
    with running(argv, log) as process:
        wait_for_port(port, process, log)
        device = Device(tmp_path / "cache", open_source(f"presigned:{index}"), unsigned=True)
        assert device.pull("net", digest(store, 2)).version == 2


def test_a_signed_version_by_its_digest(publisher: Publisher, signed: Device) -> None:
    moved = signed.pull("net", digest(publisher.store, 2))
    assert (moved.version, moved.signed) == (2, True)
    publish(publisher.store, version=3, fresh=[0])
    with pytest.raises(Untrusted, match="net: nobody signed a version with the digest sha256:"):
        signed.pull("net", digest(publisher.store, 3))


def test_an_upgrade_of_what_was_withdrawn_is_refused(publisher: Publisher, signed: Device) -> None:
    publisher.sign(tags={"latest": 2}, withdraw=[1])
    with pytest.raises(Untrusted) as caught:
        signed.upgrade("net")
    assert str(caught.value) == (
        "net version 1 was withdrawn by its publisher and stays as it is; "
        "'nestquant pull net' brings the one that counts"
    )
    assert signed.levels("net") == (0,)
    signed.pull("net")
    assert signed.upgrade("net").level == 1


def test_an_upgrade_goes_on_where_nothing_tells(publisher: Publisher, signed: Device) -> None:
    """Expired metadata, or none: the version was trusted when it came, and its blobs are checked against it."""
    seen: list[Event] = []
    signed.on_event = seen.append
    publisher.sign(lives=Lives(timestamp=-Lives().timestamp))
    assert signed.upgrade("net").level == 1
    signed.downgrade("net")
    publisher.store.delete(trust_key("net", "timestamp"))
    assert signed.upgrade("net").level == 1
    warnings = [event.message for event in seen if event.kind == "warning"]
    assert len(warnings) == 2
    assert warnings[0].startswith("whether version 1 still counts is unknown: net: what is signed has expired")
    assert warnings[1].startswith("whether version 1 still counts is unknown: net: nothing signed for it here")


def test_an_upgrade_of_what_was_deleted_is_refused(device: Device, store: LocalStore) -> None:
    device.pull("net", "2")
    delete_version(store, "net", 2)
    with pytest.raises(VersionDeleted, match="net version 2 was deleted from the source; pull another one"):
        device.upgrade("net")
    assert device.levels("net") == (0,)


def test_a_signed_version_is_given_up_by_a_second_yes_alone(publisher: Publisher, signed: Device) -> None:
    publish(publisher.store, version=3, fresh=[0])
    unsigned = Device(signed.root, signed.source, unsigned=True)
    with pytest.raises(Untrusted) as caught:
        unsigned.pull("net")
    assert str(caught.value) == (
        "net version 1 here is signed, and version 3 of the source is taken unsigned; "
        "say --replace-signed, too, to give up the signature"
    )
    assert signed.upgrade("net").signed
    assert unsigned.pull("net", "1").signed  # the very bytes that were signed
    both = Device(signed.root, signed.source, unsigned=True, replace_signed=True)
    moved = both.pull("net")
    assert (moved.version, moved.signed) == (3, False)
    assert unsigned.pull("net", "2").signed is False
    publish(publisher.store, "other")
    assert unsigned.pull("other").signed is False  # nothing signed is given up


def test_who_signs_anew_after_a_withdrawal_is_followed(publisher: Publisher, signed: Device) -> None:
    sign(publisher.store, "net", [publisher.publisher, publisher.online], tags={"latest": 2}, afresh=True)
    with pytest.raises(Untrusted, match="version 1 was withdrawn"):
        signed.upgrade("net")
    publisher.sign(versions=[1])
    assert signed.upgrade("net").version == 1
