"""Each store against the contract; for each server, what it does not keep is asserted as such."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.errors import AccessDenied, BadKey, NoSpace, NotFound, PreconditionFailed, StoreUnavailable, UnsafeStore
from storage.stores.blob_store import BlobStore
from storage.stores.capabilities import race_create, race_swap
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from storage.stores.s3 import S3Store
from storage.stores.uri import open_store
from tests.servers.s3_server import S3Server
from tests.storage.contract import BIG, ReadWriteContract, StoreContract, SwapContract


class TestMemory(SwapContract):
    @pytest.fixture
    def store(self, request: pytest.FixtureRequest) -> BlobStore:
        return MemoryStore.named(request.node.nodeid)


class TestLocal(SwapContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> BlobStore:
        return LocalStore(tmp_path / "store")

    def test_nothing_is_left_but_the_object(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.put("a/b", b"x", mode="create")
        with pytest.raises(Exception, match="already in"):
            store.put("a/b", b"y", mode="create")
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["b"]

    @pytest.mark.parametrize("mode", ["create", "overwrite"])
    def test_full_disk_leaves_nothing(self, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        store = LocalStore(tmp_path)

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(NoSpace, match=r"a/b: no space left in .* nothing was written"):
            store.put("a/b", b"x", mode=mode)  # type: ignore[arg-type]
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    @pytest.mark.parametrize("mode", ["create", "overwrite"])
    def test_what_a_write_leaves_is_on_the_disk(
        self, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file's bytes before it has its name, the folder's entry after: a power cut finds all or nothing."""
        store = LocalStore(tmp_path)
        path, real, flushed = tmp_path / "a" / "b", os.fsync, list[tuple[int, int, bool]]()

        def watched(descriptor: int) -> None:
            real(descriptor)
            seen = os.fstat(descriptor)
            flushed.append((seen.st_ino, seen.st_size if stat.S_ISREG(seen.st_mode) else -1, path.exists()))

        monkeypatch.setattr(os, "fsync", watched)
        store.put("a/b", b"whole", mode=mode)  # type: ignore[arg-type]
        assert (path.stat().st_ino, 5, False) in flushed
        assert flushed[-1] == (path.parent.stat().st_ino, -1, True)

    def test_leftovers_of_a_killed_writer(self, tmp_path: Path) -> None:
        code = (
            "import os, signal; from storage.stores.local import LocalStore;"
            f"store = LocalStore({str(tmp_path)!r});"
            "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL);"
            "store.put('a/b', b'half', mode='create')"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
        store = LocalStore(tmp_path)
        (leftover,) = (tmp_path / ".tmp").iterdir()
        assert list(store.list()) == []
        old_s = time.time() - 2 * 24 * 3600
        os.utime(leftover, (old_s, old_s))
        assert list(LocalStore(tmp_path).list()) == []
        assert leftover.exists(), "reading removes nothing"
        LocalStore(tmp_path).put("a/c", b"whole", mode="create")
        assert not leftover.exists()

    def test_a_young_leftover_may_be_a_writers(self, tmp_path: Path) -> None:
        young = tmp_path / ".tmp" / f"nestquant-{'0' * 32}.part"
        young.parent.mkdir()
        young.touch()
        LocalStore(tmp_path).put("a", b"x", mode="create")
        assert young.exists()

    @pytest.mark.parametrize("name", ["thesis.txt", "0" * 32, f"nestquant-{'0' * 32}.part.bak", "lock"])
    def test_an_old_file_of_another_name_is_never_removed(self, tmp_path: Path, name: str) -> None:
        foreign = tmp_path / ".tmp" / name
        foreign.parent.mkdir()
        foreign.write_bytes(b"not ours")
        os.utime(foreign, (0, 0))
        LocalStore(tmp_path).put("a", b"x", mode="create")
        assert foreign.read_bytes() == b"not ours"

    @pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
    def test_what_is_no_file_is_no_object_and_nobody_waits_for_it(self, tmp_path: Path, kind: str) -> None:
        store, path = LocalStore(tmp_path), tmp_path / "tag"
        with socket.socket(socket.AF_UNIX) as bound:
            match kind:
                case "pipe":
                    os.mkfifo(path)
                case "socket":
                    bound.bind(os.path.relpath(path))  # a longer path does not fit
                case "folder":
                    path.mkdir()
                case "device":
                    path.symlink_to("/dev/zero")
            for read in (
                store.get,
                store.head,
                lambda key: list(store.stream(key)),
                lambda key: store.get_range(key, 0, 4),
            ):
                with pytest.raises(NotFound, match=r"^tag: no"):
                    read("tag")
            assert list(store.list()) == []
            assert not store.exists("tag")

    def test_a_folder_in_the_place_of_the_lock_is_named(self, tmp_path: Path) -> None:
        (tmp_path / ".tmp" / "lock").mkdir(parents=True)
        with pytest.raises(StoreUnavailable, match=r"lock: a folder where this store has its lock; remove it$"):
            LocalStore(tmp_path).put("a", b"x", mode="overwrite")

    def test_leftovers_are_not_looked_for_behind_a_link(self, tmp_path: Path) -> None:
        elsewhere, store = tmp_path / "elsewhere", tmp_path / "store"
        elsewhere.mkdir()
        store.mkdir()
        foreign = elsewhere / f"nestquant-{'0' * 32}.part"
        foreign.touch()
        os.utime(foreign, (0, 0))
        (store / ".tmp").symlink_to(elsewhere)
        LocalStore(store).put("a", b"x", mode="create")
        assert foreign.exists()

    def test_a_key_is_not_both_object_and_folder(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.put("a", b"x", mode="create")
        with pytest.raises(BadKey, match="both"):
            store.put("a/b", b"x", mode="create")
        store.put("c/d", b"x", mode="create")
        with pytest.raises(BadKey, match="c: is a folder"):
            store.put("c", b"x", mode="overwrite")

    def test_a_file_system_without_hard_links_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_links(source: object, target: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", no_links)
        with pytest.raises(UnsafeStore, match="makes no hard links"):
            LocalStore(tmp_path).put("a", b"x", mode="create")

    def test_foreign_files_are_not_listed(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.put("models/a", b"x", mode="create")
        (tmp_path / "models" / "README.md").write_text("foreign")
        (tmp_path / "models" / "loop").symlink_to(tmp_path)
        assert [info.key for info in store.list()] == ["models/a"]


class TestMoto(SwapContract):
    @pytest.fixture
    def store(self, moto_s3: S3Server) -> BlobStore:
        return open_store(moto_s3.uri())

    def test_known_failure_a_wrong_secret_is_accepted(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        open_store(store.uri).put("k", b"x", mode="create")

    def test_multipart(self, moto_s3: S3Server, tmp_path: Path) -> None:
        _check_multipart(open_store(moto_s3.uri(multipart_bytes=1 << 20)), tmp_path)


class TestCeph(StoreContract):
    @pytest.fixture
    def store(self, ceph_s3: S3Server) -> BlobStore:
        return open_store(ceph_s3.uri())

    def test_multipart(self, ceph_s3: S3Server, tmp_path: Path) -> None:
        _check_multipart(open_store(ceph_s3.uri(multipart_bytes=1 << 20)), tmp_path)

    def test_known_failure_swap_is_refused_even_where_it_matches(self, store: BlobStore) -> None:
        etag = store.put("k", b"one", mode="overwrite").etag
        with pytest.raises(PreconditionFailed):
            store.put_if_match("k", b"two", etag=etag)
        race = race_swap(store)
        assert (race.holds, race.detail) == (False, "every writer was refused, the one entitled included")

    def test_wrong_secret(self, ceph_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(
            AccessDenied, match="SignatureDoesNotMatch: the signature does not match; check AWS_SECRET_ACCESS_KEY"
        ):
            open_store(ceph_s3.uri()).get("k")

    def test_unknown_key(self, ceph_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        with pytest.raises(AccessDenied, match="InvalidAccessKeyId: the server does not know this access key"):
            open_store(ceph_s3.uri()).get("k")


class TestRclone(ReadWriteContract):
    @pytest.fixture
    def store(self, rclone_s3: S3Server) -> BlobStore:
        return open_store(rclone_s3.uri())

    def test_wrong_secret(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
            open_store(store.uri).put("k", b"x", mode="create")

    def test_known_failure_every_creator_wins(self, store: BlobStore) -> None:
        store.put("k", b"mine", mode="create")
        store.put("k", b"theirs", mode="create")
        assert store.get("k") == b"theirs"
        assert (race_create(store).holds, race_create(store).detail) == (False, "8 of 8 writers won")

    def test_known_failure_every_swap_wins(self, store: BlobStore) -> None:
        assert (race_swap(store).holds, race_swap(store).detail) == (False, "8 of 8 writers won")


def _check_multipart(store: BlobStore, folder: Path) -> None:
    assert isinstance(store, S3Store)
    data = BIG * 8  # 20 MiB in parts of 8 MiB
    written = store.put("big", data, mode="overwrite")
    assert written.etag.endswith("-3")
    assert store.head("big").etag == written.etag
    assert store.get("big") == data
    (folder / "big").write_bytes(data)
    from_file = store.put_file("file", folder / "big")
    assert from_file.etag == written.etag
    assert store.get("file") == data


def test_the_object_that_a_uri_names(moto_s3: S3Server) -> None:
    """A checkpoint's name is whatever its owner chose, not a key of ours."""
    place, _, query = moto_s3.uri().partition("?")
    folder = open_store(f"{place}?{query}")
    assert isinstance(folder, S3Store)
    folder.client.put_object(Bucket=folder.bucket, Key=f"{folder.prefix}My Model.PTH", Body=BIG)
    named = open_store(f"{place}/My%20Model.PTH?{query}")
    assert isinstance(named, S3Store)
    with named.open_own() as opened:
        assert opened is not None
        assert (opened.size_bytes, b"".join(opened.pieces)) == (len(BIG), BIG)
    with named.open_own(unless_etag=opened.etag) as again:
        assert again is None
    with named.open_own(unless_etag="another") as again:
        assert again is not None
        assert (again.etag, b"".join(again.pieces)) == (opened.etag, BIG)
    missing = open_store(f"{place}/none.pth?{query}")
    assert isinstance(missing, S3Store)
    with pytest.raises(NotFound, match=r"none\.pth: no such object"), missing.open_own():
        pass


def test_multipart_is_aborted_on_failure(moto_s3: S3Server) -> None:
    store = open_store(moto_s3.uri(multipart_bytes=1 << 20))
    assert isinstance(store, S3Store)

    def fail(params: object, **_: object) -> None:
        raise ConnectionError("cable cut")

    store.client.meta.events.register("before-call.s3.CompleteMultipartUpload", fail)
    with pytest.raises(StoreUnavailable, match=r"PUT big in s3://.*: cable cut"):
        store.put("big", BIG, mode="overwrite")
    assert not store.exists("big")
    uploads = store.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    assert uploads.get("Uploads", []) == []
