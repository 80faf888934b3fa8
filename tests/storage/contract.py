"""What every store must do, written once.

A store's test class subclasses `StoreContract` and supplies the fixture ``store``.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.errors import AlreadyExists, BadKey, NotFound, PreconditionFailed, TooLarge
from storage.stores.blob_store import BlobStore
from storage.stores.uri import open_store

BIG = bytes(range(256)) * (10 * 1024)  # 2.5 MiB: three pieces of a stream
HOSTILE_KEYS = ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", ".hidden", "a.", "a\\b", "a:b", "A", "a b", "é"]
HOSTILE_KEYS += ["a\x00", "a\n", "nul", "models/con.json", "x" * 201, "/".join(["abcdefghi"] * 100)]


class ReadWriteContract:
    """The part that holds on every server, also on one that ignores preconditions."""

    def test_reads_back_what_was_written(self, store: BlobStore) -> None:
        written = store.put("blobs/a", b"hello", mode="overwrite")
        assert (written.key, written.size_bytes) == ("blobs/a", 5)
        assert store.get("blobs/a") == b"hello"
        found = store.head("blobs/a")
        assert (found.key, found.size_bytes, found.etag) == ("blobs/a", 5, written.etag)
        assert '"' not in found.etag
        assert store.exists("blobs/a")

    def test_empty_object(self, store: BlobStore) -> None:
        store.put("blobs/empty", b"", mode="overwrite")
        assert store.get("blobs/empty") == b""
        assert store.get_range("blobs/empty", 0, 10) == b""
        assert list(store.stream("blobs/empty")) == []
        assert store.head("blobs/empty").size_bytes == 0

    @pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
    def test_takes_any_bytes(self, store: BlobStore, make: type) -> None:
        store.put("blobs/kind", make(b"abc"), mode="overwrite")
        assert store.get("blobs/kind") == b"abc"

    @pytest.mark.parametrize("size", [0, 5, len(BIG)])
    def test_a_file_is_stored_as_its_bytes_are(self, store: BlobStore, size: int, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(BIG[:size])
        store.put("blobs/file", b"before", mode="overwrite")
        written = store.put_file("blobs/file", tmp_path / "file")
        assert (written.key, written.size_bytes) == ("blobs/file", size)
        assert store.get("blobs/file") == BIG[:size]
        assert store.head("blobs/file").etag == written.etag

    def test_overwrite_replaces_and_changes_the_etag(self, store: BlobStore) -> None:
        first = store.put("k", b"one", mode="overwrite")
        second = store.put("k", b"three", mode="overwrite")
        assert store.get("k") == b"three"
        assert first.etag != second.etag
        assert store.head("k").etag == second.etag

    def test_missing_object_names_the_key(self, store: BlobStore) -> None:
        for read in (
            store.get,
            store.head,
            lambda key: list(store.stream(key)),
            lambda key: store.get_range(key, 0, 1),
        ):
            with pytest.raises(NotFound, match="models/none") as caught:
                read("models/none")
            assert caught.value.key == "models/none"
        assert not store.exists("models/none")

    @pytest.mark.parametrize(
        ("start", "length", "expected"),
        [
            (0, 4, b"0123"),
            (3, 4, b"3456"),
            (8, 4, b"89"),
            (10, 4, b""),
            (99, 4, b""),
            (4, 0, b""),
            (0, 99, b"0123456789"),
        ],
    )
    def test_ranges(self, store: BlobStore, start: int, length: int, expected: bytes) -> None:
        store.put("k", b"0123456789", mode="overwrite")
        assert store.get_range("k", start, length) == expected

    def test_stream_from_the_middle(self, store: BlobStore) -> None:
        etag = store.put("k", BIG, mode="overwrite").etag
        assert b"".join(store.stream("k")) == BIG
        pieces = list(store.stream("k", start=1_000_001, etag=etag))
        assert b"".join(pieces) == BIG[1_000_001:]
        assert max(map(len, pieces)) <= 1 << 20
        assert list(store.stream("k", start=len(BIG))) == []

    def test_one_that_is_opened_says_what_it_is(self, store: BlobStore) -> None:
        written = store.put("k", BIG, mode="overwrite")
        for start, rest in ((0, BIG), (1_000_001, BIG[1_000_001:]), (len(BIG), b""), (len(BIG) + 7, b"")):
            with store.open("k", start=start) as opened:
                assert (opened.size_bytes, opened.etag, opened.start) == (len(BIG), written.etag, start)
                assert b"".join(opened.pieces) == rest
        with store.open("k") as opened:  # what its reader raises is its own
            assert len(next(iter(opened.pieces))) <= 1 << 20
            with pytest.raises(FileNotFoundError), store.open("k", start=5):
                raise FileNotFoundError

    def test_stream_of_a_replaced_object_is_refused(self, store: BlobStore) -> None:
        etag = store.put("k", b"one", mode="overwrite").etag
        store.put("k", b"another", mode="overwrite")
        with pytest.raises(PreconditionFailed, match="k: ETag"):
            list(store.stream("k", start=1, etag=etag))

    def test_get_reads_no_more_than_allowed(self, store: BlobStore) -> None:
        store.put("k", b"12345", mode="overwrite")
        assert store.get("k", max_bytes=5) == b"12345"
        with pytest.raises(TooLarge, match="k: 5 bytes, at most 4 expected"):
            store.get("k", max_bytes=4)

    def test_delete_twice(self, store: BlobStore) -> None:
        store.put("models/a", b"x", mode="overwrite")
        store.delete("models/a")
        store.delete("models/a")
        assert not store.exists("models/a")

    def test_list_and_folders(self, store: BlobStore) -> None:
        keys = [
            "models/a/tags/x.json",
            "models/a/versions/1",
            "models/a-b/versions/1",
            "models/b/versions/1",
            "modelsx/c",
        ]
        for key in reversed(keys):
            store.put(key, key.encode(), mode="overwrite")
        assert [info.key for info in store.list()] == sorted(keys)
        assert [(info.key, info.size_bytes) for info in store.list("models/a/")] == [
            (key, len(key)) for key in sorted(keys[:2])
        ]
        assert [info.key for info in store.list("models/a")] == sorted(keys[:3])
        assert list(store.list("models/none/")) == []
        assert list(store.folders("models/")) == ["a", "a-b", "b"]
        assert list(store.folders()) == ["models", "modelsx"]
        assert list(store.folders("models/a/versions/")) == []
        assert [info.etag for info in store.list("modelsx/")] == [store.head("modelsx/c").etag]

    def test_listed_time_is_the_heads(self, store: BlobStore) -> None:
        store.put("k", b"x", mode="overwrite")
        (listed,) = store.list("k")
        assert abs(listed.modified_s - store.head("k").modified_s) <= 1.0

    @pytest.mark.parametrize("key", HOSTILE_KEYS)
    def test_hostile_keys_are_refused_by_every_operation(self, store: BlobStore, key: str) -> None:
        for operation in (
            lambda: store.get(key),
            lambda: store.head(key),
            lambda: store.get_range(key, 0, 1),
            lambda: list(store.stream(key)),
            lambda: store.put(key, b"x", mode="overwrite"),
            lambda: store.put(key, b"x", mode="create"),
            lambda: store.put_file(key, Path(__file__)),
            lambda: store.put_if_match(key, b"x", etag="e"),
            lambda: store.delete(key),
        ):
            with pytest.raises(BadKey):
                operation()

    def test_the_uri_opens_the_same_store(self, store: BlobStore) -> None:
        store.put("k", b"x", mode="overwrite")
        assert open_store(store.uri).get("k") == b"x"

    def test_readers_see_whole_objects_only(self, store: BlobStore) -> None:
        versions = [bytes([number]) * 200_000 for number in range(6)]
        store.put("k", versions[0], mode="overwrite")
        stop = threading.Event()

        def read() -> int:
            count = 0
            while not stop.is_set() or count == 0:
                assert store.get("k") in versions
                count += 1
            return count

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            for version in versions[1:]:
                store.put("k", version, mode="overwrite")
            stop.set()
            assert all(reader.result() > 0 for reader in readers)


class StoreContract(ReadWriteContract):
    """All of the contract, put-if-absent included."""

    def test_create_refuses_a_taken_key(self, store: BlobStore) -> None:
        store.put("k", b"mine", mode="create")
        with pytest.raises(AlreadyExists, match="k: already in"):
            store.put("k", b"theirs", mode="create")
        assert store.get("k") == b"mine"

    def test_create_after_delete(self, store: BlobStore) -> None:
        store.put("k", b"one", mode="create")
        store.delete("k")
        store.put("k", b"two", mode="create")
        assert store.get("k") == b"two"

    def test_one_of_many_creators_wins(self, store: BlobStore) -> None:
        barrier = threading.Barrier(16)

        def create(number: int) -> bool:
            barrier.wait()
            try:
                store.put("k", f"writer {number}".encode(), mode="create")
            except AlreadyExists:
                return False
            return True

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        assert won.count(True) == 1
        assert store.get("k") == f"writer {won.index(True)}".encode()


class SwapContract(StoreContract):
    """All of it, and compare-and-swap."""

    def test_put_if_match(self, store: BlobStore) -> None:
        first = store.put("k", b"one", mode="overwrite")
        second = store.put_if_match("k", b"two", etag=first.etag)
        assert store.get("k") == b"two"
        with pytest.raises(PreconditionFailed):
            store.put_if_match("k", b"three", etag=first.etag)
        assert store.head("k").etag == second.etag
        with pytest.raises(PreconditionFailed):
            store.put_if_match("none", b"x", etag=second.etag)
        assert not store.exists("none")

    def test_no_increment_is_lost(self, store: BlobStore) -> None:
        store.put("counter", b"0", mode="overwrite")

        def increment(_: int) -> None:
            while True:
                etag = store.head("counter").etag
                try:
                    seen = int(b"".join(store.stream("counter", etag=etag)))
                    store.put_if_match("counter", str(seen + 1).encode(), etag=etag)
                except PreconditionFailed:
                    continue
                return

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(increment, range(20)))
        assert store.get("counter") == b"20"
