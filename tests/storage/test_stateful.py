"""Any sequence of operations: each store answers as a plain dict of bytes does."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from storage.errors import AlreadyExists, NotFound, PreconditionFailed
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from tests.servers.s3_server import S3Server

KEYS = st.sampled_from(["blobs/a", "blobs/b", "models/x/1", "models/x-y/1", "z"])
DATA = st.binary(max_size=64)
PREFIXES = st.sampled_from(["", "blobs/", "models/", "models/x", "models/x/", "none/", "z"])


class StoreMachine(RuleBasedStateMachine):
    """Runs the same operations on a store and on a dict."""

    swaps = True

    def __init__(self) -> None:
        super().__init__()
        self.store = self.make_store()
        self.model: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}

    def make_store(self) -> BlobStore:
        raise NotImplementedError

    def _wrote(self, key: str, data: bytes, etag: str) -> None:
        self.model[key], self.etags[key] = data, etag

    @rule(key=KEYS, data=DATA)
    def overwrite(self, key: str, data: bytes) -> None:
        self._wrote(key, data, self.store.put(key, data, mode="overwrite").etag)

    @rule(key=KEYS, data=DATA)
    def create(self, key: str, data: bytes) -> None:
        if key in self.model:
            with pytest.raises(AlreadyExists):
                self.store.put(key, data, mode="create")
        else:
            self._wrote(key, data, self.store.put(key, data, mode="create").etag)

    @precondition(lambda self: self.swaps)
    @rule(key=KEYS, data=DATA, stale=st.booleans())
    def swap(self, key: str, data: bytes, stale: bool) -> None:
        if stale or key not in self.model:
            with pytest.raises(PreconditionFailed):
                self.store.put_if_match(key, data, etag="0123456789abcdef0123456789abcdef")
        else:
            self._wrote(key, data, self.store.put_if_match(key, data, etag=self.etags[key]).etag)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.store.delete(key)
        self.model.pop(key, None)

    @rule(key=KEYS, start=st.integers(0, 70), length=st.integers(0, 70))
    def read(self, key: str, start: int, length: int) -> None:
        if key not in self.model:
            with pytest.raises(NotFound):
                self.store.get(key)
            with pytest.raises(NotFound):
                self.store.get_range(key, start, length)
            return
        data = self.model[key]
        assert self.store.get(key) == data
        assert self.store.get_range(key, start, length) == data[start : start + length]
        assert b"".join(self.store.stream(key, start=start, etag=self.etags[key])) == data[start:]
        info = self.store.head(key)
        assert (info.size_bytes, info.etag) == (len(data), self.etags[key])

    @rule(prefix=PREFIXES)
    def list(self, prefix: str) -> None:
        expected = sorted(key for key in self.model if key.startswith(prefix))
        assert [info.key for info in self.store.list(prefix)] == expected

    @invariant()
    def folders_are_those_of_the_keys(self) -> None:
        assert list(self.store.folders()) == sorted({key.partition("/")[0] for key in self.model if "/" in key})


def run(machine: type[StoreMachine], examples: int) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=20, deadline=None))


def test_memory() -> None:
    class Machine(StoreMachine):
        def make_store(self) -> BlobStore:
            return MemoryStore()

    run(Machine, 60)


def test_local() -> None:
    class Machine(StoreMachine):
        def make_store(self) -> BlobStore:
            self.folder = Path(tempfile.mkdtemp())
            return LocalStore(self.folder)

        def teardown(self) -> None:
            shutil.rmtree(self.folder)

    run(Machine, 40)


def test_moto(moto_s3: S3Server) -> None:
    shared = open_store(moto_s3.uri())

    class Machine(StoreMachine):
        def make_store(self) -> BlobStore:
            for info in shared.list():
                shared.delete(info.key)
            return shared

    run(Machine, 4)


def test_ceph(ceph_s3: S3Server) -> None:
    shared = open_store(ceph_s3.uri())

    class Machine(StoreMachine):
        swaps = False

        def make_store(self) -> BlobStore:
            for info in shared.list():
                shared.delete(info.key)
            return shared

    run(Machine, 4)
