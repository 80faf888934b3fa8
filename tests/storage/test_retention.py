"""gc removes only what nobody names, in two steps; fsck finds every kind of damage."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from storage import condemned, layout
from storage.errors import Corrupt, InvalidManifest, NotFound
from storage.manifest import Manifest
from storage.registry import Registry
from storage.retention import delete_version, fsck, gc
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from tests.storage.artifacts import make_draft, publish_new
from tests.storage.wrappers import WatchedStore


@pytest.fixture(params=["memory", "local", "moto", "ceph", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryStore(request.node.name)
    if request.param == "local":
        return LocalStore(tmp_path)
    return open_store(request.getfixturevalue(f"{request.param}_s3").uri())


def blob_keys(draft: Manifest) -> set[str]:
    return {layout.blob_key(blob.digest) for blob in draft.descriptors()}


def stored_blobs(store: BlobStore) -> set[str]:
    return {info.key for info in store.list("blobs/")}


def test_gc_keeps_what_versions_name_and_removes_the_rest(store: BlobStore) -> None:
    registry = Registry(store)
    kept, gone = make_draft(registry, seed=1, groups=1), make_draft(registry, seed=2, groups=1)
    registry.publish(kept, single_writer=True)
    registry.publish(gone, single_writer=True)
    loose = registry.put_blob(b"of a job that never ended", "application/octet-stream")
    delete_version(store, "net", 2)
    time.sleep(1.1)  # S3 tells times in whole seconds, and a blob as young as the mark is spared
    expected = (blob_keys(gone) - blob_keys(kept)) | {layout.blob_key(loose.digest)}
    before = {info.key for info in store.list()}

    dry = gc(store, grace_s=0)
    assert (dry.dry_run, dry.versions, dry.kept_blobs) == (True, 1, 3)
    assert set(dry.removed) == expected
    assert {info.key for info in store.list()} == before

    first = gc(store, grace_s=3600, dry_run=False)
    assert (set(first.condemned), first.removed) == (expected, ())
    assert stored_blobs(store) == blob_keys(kept) | expected
    assert gc(store, grace_s=3600, dry_run=False).removed == ()

    swept = gc(store, grace_s=0, dry_run=False)
    assert (set(swept.removed), swept.condemned) == (expected, ())
    assert (
        swept.removed_bytes
        == sum(blob.size_bytes for blob in gone.descriptors() if layout.blob_key(blob.digest) in expected) + 25
    )
    assert stored_blobs(store) == blob_keys(kept)
    assert condemned.read_condemned(store) == {}
    assert fsck(store).problems == ()


def test_a_condemned_blob_that_is_wanted_again_is_saved() -> None:
    store = MemoryStore("wanted")
    draft = make_draft(Registry(store), groups=1)
    gc(store, grace_s=3600, dry_run=False)
    assert set(condemned.read_condemned(store)) == blob_keys(draft)
    watched = WatchedStore(store)
    registry = Registry(watched)
    assert make_draft(registry, groups=1) == draft  # a job that finds its blobs there, but marked
    assert set(watched.written()) == blob_keys(draft)
    assert gc(store, grace_s=0.0005, dry_run=False).removed == ()
    registry.publish(draft)
    gc(store, grace_s=0, dry_run=False)
    assert stored_blobs(store) == blob_keys(draft)
    assert fsck(store).problems == ()


def test_a_blob_sent_again_between_the_list_and_its_removal_is_saved() -> None:
    store = MemoryStore("race")
    draft = make_draft(Registry(store), groups=1)

    class Racing(WatchedStore):
        def before(self, index, step):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            if (step.operation, step.key) == ("put", layout.CONDEMNED_KEY) and not condemned.read_condemned(self.inner):
                return
            if step.operation == "head" and step.key in blob_keys(draft):
                self.inner.put(step.key, self.inner.get(step.key), mode="overwrite")

    assert gc(Racing(store), grace_s=0, dry_run=False).removed == ()
    assert stored_blobs(store) == blob_keys(draft)


def test_gc_stops_at_a_manifest_that_it_cannot_read() -> None:
    store = MemoryStore("damaged")
    publish_new(store, seed=1)
    publish_new(store, seed=2)
    raw = store.get("models/net/versions/00000002.json")
    store.put("models/net/versions/00000002.json", raw.replace(b'"name":"net"', b'"name":"ten"'), mode="overwrite")
    before = stored_blobs(store)
    with pytest.raises(InvalidManifest, match="net version 2"):
        gc(store, grace_s=0, dry_run=False)
    assert stored_blobs(store) == before


def test_gc_does_not_lose_a_version_that_list_hides() -> None:
    """A listing that lags: it shows the model by its oldest version alone, and hides the newest manifest."""
    store = MemoryStore("lagging")
    publish_new(store, seed=1)
    publish_new(store, seed=2)

    class Lagging(WatchedStore):
        def list(self, prefix=""):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            return (info for info in super().list(prefix) if not info.key.endswith("00000002.json"))

    before = stored_blobs(store)
    assert gc(Lagging(store), grace_s=0, dry_run=False).removed == ()
    assert stored_blobs(store) == before


def test_gc_sweeps_old_probes_of_ours_only(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    old, young, foreign = f"doctor/{'0' * 32}", f"doctor/{'1' * 32}/list/3", "doctor/notes.txt"
    for key in (old, young, foreign):
        store.put(key, b"", mode="overwrite")
    for key in (old, foreign):
        os.utime(tmp_path / key, (0, 0))
    gc(store, dry_run=False)
    assert [info.key for info in store.list("doctor/")] == sorted([young, foreign])


def test_gc_and_deletion_leave_what_only_looks_like_ours(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    registry = Registry(store)
    registry.publish(make_draft(registry, groups=1))
    foreign = [
        "blobs/sha256/aa/x",
        f"blobs/sha256/aa/{'b' * 64}",
        f"blobs/sha256/aa/{'a' * 64}.bak",
        f"blobs/sha256/{'a' * 64}",
        "models/net/versions/00000001.my.notes.json",
        "models/net/versions/00000001.txt",
    ]
    for key in foreign:
        store.put(key, b"not ours", mode="create")
    registry.put_report("net", 1, "accuracy", b"{}")
    delete_version(store, "net", 1)
    gc(store, grace_s=0, dry_run=False)
    assert [store.get(key) for key in foreign] == [b"not ours"] * len(foreign)
    assert not store.exists(layout.report_key("net", 1, "accuracy"))


def test_fsck_names_each_damage(store: BlobStore) -> None:
    registry = Registry(store)
    draft = make_draft(registry, seed=1, groups=1)
    registry.publish(draft, single_writer=True)
    registry.tag("net", "latest", 1)
    report = fsck(store)
    assert (report.models, report.versions, report.blobs, report.problems) == (1, 1, 3, ())
    assert report.bytes_read == sum(blob.size_bytes for blob in draft.descriptors())

    base, high, low = (layout.blob_key(blob.digest) for blob in draft.descriptors())
    data = bytearray(store.get(base))
    data[-1] ^= 1
    store.put(base, data, mode="overwrite")
    store.put(high, store.get(high)[:-1], mode="overwrite")
    store.delete(low)
    problems = fsck(store, "net").problems
    assert len(problems) == 3
    assert all(problem.startswith("net version 1: ") for problem in problems)
    for key, words in ((base, "seen"), (high, "seen"), (low, "no such object")):
        (problem,) = [problem for problem in problems if key in problem]
        assert words in problem

    manifest = "models/net/versions/00000001.json"
    store.put(manifest, store.get(manifest)[:-1], mode="overwrite")
    problems = fsck(store).problems
    assert [problem.partition(": ")[0] for problem in problems] == ["net version 1", "net tag 'latest'"]
    assert "not canonical JSON" in problems[0]


def test_a_damaged_condemned_list_stops_gc_and_publishing() -> None:
    store = MemoryStore("list")
    store.put(layout.CONDEMNED_KEY, b"{", mode="overwrite")
    with pytest.raises(Corrupt, match=r"gc/condemned\.json"):
        gc(store)


def test_deleting_what_is_not_there() -> None:
    with pytest.raises(NotFound, match="model 'net': no version 1"):
        delete_version(MemoryStore("none"), "net", 1)
