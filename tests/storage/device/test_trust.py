"""Signed metadata: what a publisher says, what a device believes, and every lie that it must not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from storage.device import Device, StoreSource
from storage.device.errors import DeviceError, SourceError, Untrusted
from storage.digest import Data
from storage.errors import InvalidManifest
from storage.layout import manifest_key
from storage.registry import Registry
from storage.signing.keys import SigningError, generate_key, load_key, load_public_key
from storage.signing.metadata import Lives, Signed, refresh, sign, trust_key
from storage.signing.root import add_key, create_root, newest_root, revoke_key, root_key
from storage.stores.blob_store import ObjectInfo, PutMode
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from tests.storage.device.artifacts import publish
from tests.storage.device.signed import Publisher

PAST = Lives(timestamp=timedelta(seconds=-1))


@pytest.fixture
def device(publisher: Publisher, tmp_path: Path) -> Device:
    publish(publisher.store)
    publisher.sign(tags={"latest": 1})
    return publisher.device(tmp_path / "cache")


def keep(store: LocalStore, name: str = "net") -> dict[str, bytes]:
    """Remember a model's signed documents as an attacker would, to show them again later."""
    return {key: store.get(key) for key in [info.key for info in store.list(f"models/{name}/trust/")]}


def restore(store: LocalStore, kept: dict[str, bytes]) -> None:
    for key, data in kept.items():
        store.put(key, data, mode="overwrite")


def test_a_signed_version_is_pulled_and_known_as_such(publisher: Publisher, device: Device) -> None:
    assert device.pull("net").signed
    assert device.upgrade("net").signed
    assert Device(device.root).verify("net").whole
    publish(publisher.store, version=2, fresh=[0])
    done = publisher.sign(tags={"latest": 2, "stable": 1})
    assert (done.edition, done.versions, done.tags) == (2, (1, 2), {"latest": 2, "stable": 1})
    assert device.pull("net").version == 2
    assert device.pull("net", "stable").version == 1
    assert device.pull("net", "2").version == 2


def test_without_a_root_nothing_is_taken(publisher: Publisher, tmp_path: Path) -> None:
    publish(publisher.store)
    with pytest.raises(Untrusted, match="no root of trust; give one"):
        Device(tmp_path / "cache", StoreSource(publisher.store)).pull("net")
    with pytest.raises(Untrusted, match=r"net: nothing signed for it here .*--allow-unsigned"):
        publisher.device(tmp_path / "cache").pull("net")
    with pytest.raises(Untrusted, match="the root of trust given is none"):
        publisher.device(tmp_path / "other", b"{}").pull("net")


def test_a_root_is_pinned_and_not_exchanged(publisher: Publisher, device: Device, tmp_path: Path) -> None:
    device.pull("net")
    again = Device(device.root, device.source)
    assert again.pull("net").signed
    other = LocalStore(tmp_path / "other")
    stranger = CryptoSigner.generate_ed25519()
    foreign = create_root(other, [stranger], publishers=[stranger.public_key], online=[stranger.public_key])
    with pytest.raises(Untrusted, match="trusts another root"):
        publisher.device(Path(device.root), foreign).pull("net")


def test_tags_of_the_store_are_not_asked(publisher: Publisher, device: Device) -> None:
    publish(publisher.store, version=2, fresh=[0])  # the unsigned tag says 2
    assert device.pull("net").version == 1
    with pytest.raises(Untrusted, match="net: nobody signed version '2'"):
        device.pull("net", "2")
    with pytest.raises(Untrusted, match="net: nobody signed tag 'stable'"):
        device.pull("net", "stable")


def test_no_rollback(publisher: Publisher, device: Device) -> None:
    old = keep(publisher.store)
    publish(publisher.store, version=2, fresh=[0])
    publisher.sign(tags={"latest": 2})
    assert device.pull("net").version == 2
    restore(publisher.store, old)
    with pytest.raises(Untrusted, match="older metadata than was trusted before"):
        device.pull("net")
    device.remove("net")
    with pytest.raises(Untrusted, match="older metadata than was trusted before"):
        device.pull("net")
    assert device.names() == []


def test_no_freeze(publisher: Publisher, device: Device) -> None:
    device.pull("net")
    publisher.sign(lives=PAST)
    with pytest.raises(Untrusted, match="what is signed has expired"):
        device.pull("net")
    assert device.verify("net").whole
    refresh(publisher.store, "net", [publisher.online])
    assert device.pull("net").received_bytes == 0


def test_a_clock_set_back_does_not_unfreeze(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.pull("net")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 40 * 86_400)
    with pytest.raises(Untrusted, match=r"this machine's clock is 345[56]\d{3} s behind the publisher's"):
        device.pull("net")


def test_no_mix_and_match_within_a_model(publisher: Publisher, device: Device) -> None:
    first = keep(publisher.store)
    publish(publisher.store, version=2, fresh=[0])
    publisher.sign(tags={"latest": 2})
    one, two = trust_key("net", "1.snapshot"), trust_key("net", "2.snapshot")
    publisher.store.put(two, first[one], mode="overwrite")
    with pytest.raises(Untrusted):
        device.pull("net")
    restore(publisher.store, {trust_key("net", "2.targets"): first[trust_key("net", "1.targets")]})
    with pytest.raises(Untrusted):
        device.pull("net")


def test_no_mix_and_match_between_models(publisher: Publisher, device: Device) -> None:
    device.pull("net")
    publish(publisher.store, "other")
    publisher.sign("other", tags={"latest": 1})
    kept = keep(publisher.store)
    foreign = {key.replace("/other/", "/net/"): data for key, data in keep(publisher.store, "other").items()}
    restore(publisher.store, foreign)
    with pytest.raises(Untrusted, match="is signed for 'other', not for 'net'"):
        device.pull("net")
    restore(publisher.store, kept)
    assert device.pull("net").version == 1  # the lie has left no trace


def test_a_manifest_exchanged_after_signing(publisher: Publisher, device: Device) -> None:
    key = manifest_key("net", 1)
    raw = bytearray(publisher.store.get(key))
    raw[raw.index(b'"sizes"') + 3] ^= 1
    publisher.store.put(key, bytes(raw), mode="overwrite")
    with pytest.raises(Untrusted, match="the manifest there is not the one that was signed"):
        device.pull("net")
    publisher.store.put(key, bytes(raw) * 2, mode="overwrite")
    with pytest.raises(SourceError, match=r"bytes announced, at most \d+ accepted"):
        device.pull("net")


def test_no_endless_metadata(publisher: Publisher, device: Device) -> None:
    publisher.store.put(trust_key("net", "timestamp"), b" " * 20_000, mode="overwrite")
    with pytest.raises(SourceError, match="20000 bytes announced, at most 16384 accepted"):
        device.pull("net")


@pytest.mark.parametrize("document", ["timestamp", "1.snapshot", "1.targets"])
@pytest.mark.parametrize(
    "rubbish", [b"", b"{}", b"[" * 50_000, b'{"signed":null}', b'{"signed":{"version":NaN}}', b"\xff"]
)
def test_rubbish_is_refused(publisher: Publisher, device: Device, document: str, rubbish: bytes) -> None:
    publisher.store.put(trust_key("net", document), rubbish[:16_000], mode="overwrite")
    with pytest.raises((Untrusted, SourceError)) as caught:
        device.pull("net")
    assert "\n" not in str(caught.value)
    assert device.names() == []


@pytest.mark.parametrize("document", ["timestamp", "1.snapshot", "1.targets"])
def test_every_byte_of_the_metadata_counts(publisher: Publisher, tmp_path: Path, device: Device, document: str) -> None:
    key = trust_key("net", document)
    right = publisher.store.get(key)
    at = right.index(b'"expires": "') + 15 if b'"expires": "' in right else right.index(b'"expires":"') + 14
    for position in (at, right.index(b'"sig') + 12):
        wrong = bytearray(right)
        wrong[position] = ord("3") if wrong[position] != ord("3") else ord("4")
        publisher.store.put(key, bytes(wrong), mode="overwrite")
        with pytest.raises(Untrusted):
            publisher.device(tmp_path / f"{position}").pull("net")
    publisher.store.put(key, right, mode="overwrite")
    assert device.pull("net").signed


@pytest.mark.parametrize("which", ["publisher", "online"])
def test_a_revoked_key_counts_no_more(publisher: Publisher, device: Device, tmp_path: Path, which: str) -> None:
    device.pull("net")
    publish(publisher.store, "other")
    publisher.sign("other", tags={"latest": 1})
    device.pull("other")
    stolen, fresh = getattr(publisher, which), CryptoSigner.generate_ed25519()
    revoke_key(publisher.store, stolen.public_key.keyid, [publisher.root], replacement=fresh.public_key)
    with pytest.raises(Untrusted, match="not signed by the keys that the root names"):
        device.pull("net")
    with pytest.raises(SigningError, match=r"no key given that may sign|sign afresh"):
        publisher.sign(tags={"latest": 1})
    setattr(publisher, which, fresh)
    publisher.sign(tags={"latest": 1}, afresh=True)
    assert device.pull("net").signed
    # the thief shows the other model with the root of before: the cache knows better
    publisher.store.delete(root_key(2))
    with pytest.raises(Untrusted, match="not signed by the keys that the root names"):
        device.pull("other")


def test_root_keys_rotate_and_devices_follow(publisher: Publisher, device: Device, tmp_path: Path) -> None:
    device.pull("net")
    fresh = CryptoSigner.generate_ed25519()
    with pytest.raises(SigningError, match="root of trust: root was signed by 0/1 keys"):
        revoke_key(publisher.store, publisher.root.public_key.keyid, [fresh], replacement=fresh.public_key)
    both = [publisher.root, fresh]
    second = revoke_key(publisher.store, publisher.root.public_key.keyid, both, replacement=fresh.public_key)
    with pytest.raises(SigningError, match="root of trust"):
        add_key(publisher.store, "online", fresh.public_key, [publisher.root])
    add_key(publisher.store, "online", fresh.public_key, [fresh])
    assert newest_root(publisher.store).signed.version == 3
    assert device.pull("net").signed
    assert publisher.device(tmp_path / "new", second).pull("net").signed
    assert publisher.device(Path(device.root), second).pull("net").signed


def test_the_last_key_of_a_role_is_not_revoked(publisher: Publisher) -> None:
    with pytest.raises(SigningError, match="too few keys sign for snapshot; give a replacement"):
        revoke_key(publisher.store, publisher.online.public_key.keyid, [publisher.root])
    with pytest.raises(SigningError, match="signs for nothing"):
        revoke_key(publisher.store, "0" * 64, [publisher.root])


def test_a_threshold_of_root_keys(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    one, two, other = (CryptoSigner.generate_ed25519() for _ in range(3))
    keys = {"publishers": [other.public_key], "online": [other.public_key]}
    with pytest.raises(SigningError, match="1/2"):
        create_root(store, [one], threshold=2, **keys)
    create_root(store, [one, two], threshold=2, **keys)
    with pytest.raises(SigningError, match="1/2"):
        add_key(store, "online", one.public_key, [two])
    with pytest.raises(SigningError, match="somebody else changed the keys"):
        create_root(store, [other], **keys)


def test_withdrawn_versions_are_refused(publisher: Publisher, device: Device) -> None:
    device.pull("net")
    publish(publisher.store, version=2, fresh=[0])
    publisher.sign(tags={"latest": 2}, withdraw=[1])
    with pytest.raises(Untrusted, match="nobody signed version '1'"):
        device.pull("net", "1")
    assert device.pull("net").version == 2


def test_concurrent_signers_lose_nothing(publisher: Publisher, tmp_path: Path) -> None:
    for version in range(1, 13):
        publish(publisher.store, version=version, fresh=[0], groups=1, shard_bytes=10)

    def one(version: int) -> Signed:
        return publisher.sign(tags={"latest": version, f"v{version}": version}, backwards="skip")

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(one, range(1, 13)))
    assert sorted(signed.edition for signed in done)[-1] == 12
    device = publisher.device(tmp_path / "cache")
    assert [device.resolve("net", f"v{version}").manifest.version for version in range(1, 13)] == list(range(1, 13))
    assert device.resolve("net", "latest").manifest.version == 12  # whoever came last
    timestamp = json.loads(publisher.store.get(trust_key("net", "timestamp")))
    assert timestamp["signed"]["meta"]["snapshot.json"]["version"] == 12


class Overtaken(LocalStore):
    """Before the first timestamp is written, ``meanwhile`` happens."""

    meanwhile: Callable[[], object] | None = None

    def put(self, key: str, data: Data, *, mode: PutMode) -> ObjectInfo:
        if key.endswith("timestamp.json") and self.meanwhile is not None:
            happens, self.meanwhile = self.meanwhile, None
            happens()
        return super().put(key, data, mode=mode)


def test_a_slow_signer_does_not_hide_a_faster_one(publisher: Publisher, tmp_path: Path) -> None:
    for version in (1, 2):
        publish(publisher.store, version=version, fresh=[0])
    slow = Overtaken(publisher.store.root)
    slow.meanwhile = lambda: publisher.sign(tags={"latest": 2})
    done = sign(slow, "net", [publisher.publisher, publisher.online], tags={"latest": 1})
    assert (done.edition, done.tags) == (2, {"latest": 2})
    assert publisher.device(tmp_path / "cache").pull("net").version == 2


def test_a_signer_killed_between_two_writes_is_completed(publisher: Publisher, device: Device) -> None:
    publish(publisher.store, version=2, fresh=[0])
    before = keep(publisher.store)
    publisher.sign(tags={"latest": 2})
    restore(publisher.store, before)  # the timestamp of before; snapshot gone
    publisher.store.delete(trust_key("net", "2.snapshot"))
    assert device.pull("net").version == 1
    refresh(publisher.store, "net", [publisher.online])
    assert device.pull("net").version == 2


def test_a_local_record_lost_to_a_power_cut(publisher: Publisher, device: Device) -> None:
    device.pull("net")
    folder = Path(device.root) / "trust/models/net"
    for path in [folder / "timestamp.json", folder / "snapshot.json", *folder.glob("root_history/*")]:
        path.write_bytes(b"")
    assert device.pull("net").signed


def test_a_publisher_builds_on_nothing_foreign(publisher: Publisher) -> None:
    """Else what was signed for one model would be signed again, in good faith, for another."""
    for name in ("net", "other"):
        publish(publisher.store, name)
    publisher.sign("other", tags={"latest": 1})
    restore(
        publisher.store, {key.replace("other", "net"): data for key, data in keep(publisher.store, "other").items()}
    )
    with pytest.raises(SigningError, match="net: the targets there is of another model"):
        publisher.sign(tags={"latest": 1})
    with pytest.raises(SigningError, match="net: the targets there is of another model"):
        refresh(publisher.store, "net", [publisher.online])


def test_only_published_manifests_are_signed(publisher: Publisher) -> None:
    publisher.store.put(manifest_key("net", 1), b"{}", mode="create")
    with pytest.raises(InvalidManifest):
        publisher.sign(tags={"latest": 1})
    with pytest.raises(SigningError, match="nothing was signed yet"):
        refresh(publisher.store, "net", [publisher.online])


@pytest.mark.parametrize("name", ["../evil", "/abs", "con", "a/b", "A", "", ".."])
def test_names_that_are_paths(device: Device, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: device.pull(name),
        lambda: device.status(name),
        lambda: device.pull("net", name),
    ]
    for call in calls:
        with pytest.raises(Exception, match=r"name|tag|segment|key") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_keys_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys/root.pem"
    made = generate_key(path, passphrase="open sesame")
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path, passphrase="open sesame").public_key == made.public_key
    with pytest.raises(SigningError, match="wrong or missing passphrase"):
        load_key(path)
    with pytest.raises(SigningError, match="never overwritten"):
        generate_key(path)
    assert load_public_key(tmp_path / "keys/root.pem.pub") == made.public_key
    with pytest.raises(SigningError, match="not a PEM public key"):
        load_public_key(path)
    plain = generate_key(tmp_path / "online.pem")
    monkeypatch.setenv("NQ_KEY", (tmp_path / "online.pem").read_text())
    assert load_key("env:NQ_KEY").public_key == plain.public_key
    with pytest.raises(SigningError, match="env:NQ_NONE: the variable is not set"):
        load_key("env:NQ_NONE")
    with pytest.raises(SigningError, match="No such file"):
        load_key(tmp_path / "none.pem")


def test_a_store_without_a_root_says_so() -> None:
    with pytest.raises(SigningError, match="no root of trust"):
        newest_root(MemoryStore())
    assert issubclass(Untrusted, DeviceError)


def test_a_signed_tag_follows_its_entries_whoever_signs_last(publisher: Publisher, tmp_path: Path) -> None:
    """Entries order what is signed: a signer that was held up signs no tag back, and a person's move back is signed."""
    for version in (1, 2, 3):
        publish(publisher.store, version=version)
    registry = Registry(publisher.store)
    early = registry.tag("net", "stable", 2)
    late = registry.tag("net", "stable", 3)
    assert publisher.sign(moves=[late]).tags == {"stable": 3}
    assert publisher.sign(moves=[early]).tags == {"stable": 3}
    device = publisher.device(tmp_path / "cache")
    assert device.pull("net", "stable").version == 3
    back = registry.tag_log("net", "stable").undo()
    assert publisher.sign(moves=[back]).tags == {"stable": 2}
    assert publisher.sign(moves=[late]).tags == {"stable": 2}, "version 3 was taken back"
    assert device.pull("net", "stable").version == 2
    entries = [registry.tag("net", "stable", 3), registry.tag("net", "stable", 1, back=True)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda entry: publisher.sign(moves=[entry]), entries))
    assert device.pull("net", "stable").version == 1
