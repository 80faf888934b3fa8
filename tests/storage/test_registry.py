"""Names and numbers: publish, resolve, tag, what a reader may rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage import layout
from storage.errors import BadKey, Corrupt, InvalidManifest, NotFound, TooLarge, UnsafeStore, VersionDeleted
from storage.manifest import canonical_json
from storage.registry import Published, Registry
from storage.retention import delete_version
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from tests.servers.s3_server import S3Server
from tests.storage.artifacts import make_draft, publish_new
from tests.storage.wrappers import WatchedStore


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(request.node.name)


@pytest.fixture
def registry(store: MemoryStore) -> Registry:
    return Registry(store)


def test_versions_count_from_one_and_same_content_is_one_version(registry: Registry) -> None:
    first = registry.publish(make_draft(registry, seed=1))
    assert (first.name, first.version, first.created) == ("net", 1, True)
    assert registry.publish(make_draft(registry, seed=1)) == Published("net", 1, first.digest, created=False)
    second = registry.publish(make_draft(registry, seed=2))
    assert (second.version, second.created) == (2, True)
    # What is not the newest is published anew: the newest version is what a tag-less reader gets.
    third = registry.publish(make_draft(registry, seed=1))
    assert (third.version, third.created) == (3, True)
    assert third.digest != first.digest
    assert registry.versions("net") == [1, 2, 3]
    assert registry.models() == ["net"]


def test_layout_of_a_store(store: MemoryStore, registry: Registry) -> None:
    draft = make_draft(registry, seed=1)
    published = registry.publish(draft)
    registry.tag("net", "latest", 1)
    registry.put_report("net", 1, "accuracy", b'{"top1":0.5}')
    keys = {info.key for info in store.list()}
    blobs = {f"blobs/sha256/{blob.digest[7:9]}/{blob.digest[7:]}" for blob in draft.descriptors()}
    assert len(blobs) == 5
    assert keys - blobs == {
        "models/net/versions/00000001.json",
        "models/net/versions/00000001.accuracy.json",
        "models/net/tags/latest.json",
        "models/net/entries/latest/00000001.json",
        "models/net/entries/latest/newest.json",
    }
    assert json.loads(store.get("models/net/tags/latest.json")) == {
        "digest": published.digest,
        "name": "net",
        "version": 1,
    }
    assert registry.versions("net") == [1]
    assert registry.get_report("net", 1, "accuracy") == b'{"top1":0.5}'


def test_resolve_by_tag_number_and_digest(registry: Registry) -> None:
    published = [registry.publish(make_draft(registry, seed=seed)) for seed in range(3)]
    registry.tag("net", "stable", 2)
    for ref in ("stable", "2", 2, published[1].digest):
        resolved = registry.resolve("net", ref)
        assert (resolved.version, resolved.digest) == (2, published[1].digest)
        assert canonical_json(resolved.manifest) == resolved.raw
        assert resolved.manifest.recipe == {"seed": 1}
    registry.tag("net", "stable", 3)
    assert registry.resolve("net", "stable").version == 3
    assert registry.tags("net") == {"stable": 3}


def test_unknown_names_say_what_to_try(registry: Registry) -> None:
    publish_new(registry.store)
    with pytest.raises(NotFound, match=r"no tag .latest. in .*; .nestquant ls. shows"):
        registry.resolve("net")
    with pytest.raises(NotFound, match="model 'net': no version 9 in"):
        registry.resolve("net", 9)
    with pytest.raises(NotFound, match="model 'net': no version has the digest sha256:00"):
        registry.resolve("net", "sha256:" + "0" * 64)
    with pytest.raises(NotFound, match="no version 9"):
        registry.tag("net", "latest", 9)
    with pytest.raises(NotFound, match="model 'other': no tag"):
        registry.resolve("other")


@pytest.mark.parametrize("name", ["", "Net", "../net", "a/b", "net.", "n" * 129, "nul", "a\n"])
def test_hostile_names_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(BadKey):
        registry.resolve(name, 1)


@pytest.mark.parametrize("tag", ["", "12", "Latest", "a/b", "..", "sha256:" + "g" * 64, "latest\n", "con"])
def test_hostile_tags_are_refused(registry: Registry, tag: str) -> None:
    publish_new(registry.store)
    with pytest.raises(BadKey):
        registry.tag("net", tag, 1)


@pytest.mark.parametrize("version", [0, 100_000_000, 10**30])
def test_versions_out_of_range_are_refused(registry: Registry, version: int) -> None:
    with pytest.raises(BadKey, match="expected 1 to 99999999"):
        registry.resolve("net", version)


def test_publish_checks_every_blob(store: MemoryStore, registry: Registry) -> None:
    draft = make_draft(registry)
    victim = layout.blob_key(draft.groups[1].levels[1].digest)
    whole = store.get(victim)
    store.delete(victim)
    with pytest.raises(NotFound, match=victim):
        registry.publish(draft)
    store.put(victim, whole[:-1], mode="overwrite")
    with pytest.raises(Corrupt, match=f"{victim}: expected {len(whole)} bytes, seen {len(whole) - 1} bytes"):
        registry.publish(draft)
    assert registry.versions("net") == []
    make_draft(registry)  # a run of the job sends the broken one again
    assert store.get(victim) == whole
    assert registry.publish(draft).version == 1


def test_blobs_are_verified_when_read(store: MemoryStore, registry: Registry) -> None:
    blob = registry.put_blob(b"weights", "application/octet-stream")
    assert registry.get_blob(blob) == b"weights"
    store.put(layout.blob_key(blob.digest), b"weightz", mode="overwrite")
    with pytest.raises(Corrupt, match=f"expected {blob.digest}, seen sha256:"):
        registry.get_blob(blob)
    store.put(layout.blob_key(blob.digest), b"weights and much more", mode="overwrite")
    with pytest.raises(TooLarge):
        registry.get_blob(blob)


def test_a_blob_that_is_there_is_not_sent_again(store: MemoryStore) -> None:
    watched = WatchedStore(store)
    first = make_draft(Registry(watched))
    assert len(watched.written()) == 5
    watched.steps.clear()
    assert make_draft(Registry(watched)) == first
    assert watched.written() == []


def test_the_next_number_needs_no_list(store: MemoryStore) -> None:
    for seed in range(21):
        publish_new(store, seed=seed)
    watched = WatchedStore(store)
    registry = Registry(watched)
    assert registry.newest_version("net") == 21
    assert {step.operation for step in watched.steps} == {"head", "get"}
    assert len(watched.steps) <= 11  # the tag, 5 doublings, 4 bisections and one more
    watched.steps.clear()
    assert registry.newest_version("net") == 21
    assert len(watched.steps) == 2
    Registry(store).tag("net", "latest", 20)
    watched.steps.clear()
    assert Registry(watched).newest_version("net") == 21
    assert len(watched.steps) == 5
    assert not {"list", "folders"} & {step.operation for step in watched.steps}


def test_a_stale_or_lying_hint_does_no_harm(store: MemoryStore) -> None:
    for seed in range(5):
        publish_new(store, seed=seed)
    Registry(store).tag("net", "latest", 1)
    assert Registry(store).newest_version("net") == 5
    lie = json.dumps({"name": "net", "version": 77, "digest": "sha256:" + "0" * 64}).encode()
    store.put("models/net/tags/latest.json", lie, mode="overwrite")
    assert Registry(store).newest_version("net") == 5


def test_a_deleted_version_keeps_its_number(store: MemoryStore, registry: Registry) -> None:
    for seed in range(3):
        publish_new(store, seed=seed)
    digest = registry.resolve("net", 3).digest
    registry.put_report("net", 3, "accuracy", b"{}")
    registry.tag("net", "latest", 3)
    deleted = delete_version(store, "net", 3)
    assert (deleted.version, deleted.digest, deleted.dangling_tags) == (3, digest, ("latest",))
    assert registry.versions("net") == [1, 2]
    for ref in ("3", "latest"):
        with pytest.raises(VersionDeleted, match="version 3 was deleted"):
            registry.resolve("net", ref)
    with pytest.raises(VersionDeleted):
        delete_version(store, "net", 3)
    with pytest.raises(NotFound):
        registry.get_report("net", 3, "accuracy")
    assert publish_new(store, seed=2) == 4
    assert registry.versions("net") == [1, 2, 4]
    with pytest.raises(NotFound, match="no version has the digest"):
        registry.resolve("net", digest)


def test_a_tag_that_does_not_fit_its_version_is_corrupt(store: MemoryStore, registry: Registry) -> None:
    publish_new(store)
    lie = json.dumps({"name": "net", "version": 1, "digest": "sha256:" + "0" * 64}).encode()
    store.put("models/net/tags/latest.json", lie, mode="overwrite")
    with pytest.raises(Corrupt, match=r"00000001.json: expected sha256:0+ \(tag 'latest'\), seen sha256:"):
        registry.resolve("net")
    store.put("models/net/tags/latest.json", lie.replace(b'"net"', b'"ten"'), mode="overwrite")
    with pytest.raises(InvalidManifest, match="is a tag of 'ten', expected 'net'"):
        registry.resolve("net")
    store.put("models/net/tags/latest.json", b"[]" * 4000, mode="overwrite")
    with pytest.raises(TooLarge):
        registry.resolve("net")


def test_a_manifest_under_another_number_is_refused(store: MemoryStore, registry: Registry) -> None:
    publish_new(store)
    store.put("models/net/versions/00000002.json", store.get("models/net/versions/00000001.json"), mode="create")
    with pytest.raises(InvalidManifest, match="manifest of net version 2: says that it is net version 1"):
        registry.resolve("net", 2)


def test_unsafe_store_needs_single_writer_said(rclone_s3: S3Server) -> None:
    store = open_store(rclone_s3.uri())
    registry = Registry(store)
    draft = make_draft(registry, seed=1)
    with pytest.raises(UnsafeStore, match=r"ignores put-if-absent, .* say --single-writer"):
        registry.publish(draft)
    assert registry.versions("net") == []
    assert registry.publish(draft, single_writer=True).version == 1
    assert registry.resolve("net", 1).manifest.single_writer is True
    assert registry.publish(draft, single_writer=True).created is False
    assert registry.publish(make_draft(registry, seed=2), single_writer=True).version == 2


@pytest.mark.parametrize("kind", ["local", "moto", "ceph"])
def test_safe_stores_record_no_single_writer(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store: BlobStore = LocalStore(tmp_path)
    if kind != "local":
        store = open_store(request.getfixturevalue(f"{kind}_s3").uri())
    registry = Registry(store)
    assert registry.publish(make_draft(registry), single_writer=True).created
    registry.tag("net", "latest", 1)
    resolved = registry.resolve("net")
    assert resolved.manifest.single_writer is False
    assert [len(registry.get_blob(blob)) for blob in resolved.manifest.descriptors()] == [
        blob.size_bytes for blob in resolved.manifest.descriptors()
    ]
