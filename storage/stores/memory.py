"""A store in this process's memory: for tests, and the model that the other stores are held against."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from typing_extensions import override

from storage.digest import Data
from storage.errors import AlreadyExists, NotFound, PreconditionFailed
from storage.stores.blob_store import BlobStore, ObjectInfo, Opened, PutMode, check_key, check_limit

_PIECE_BYTES = 1 << 20


class MemoryStore(BlobStore):
    """Objects in a dict behind one lock. ``memory://name`` names the same store everywhere in the process."""

    _named: dict[str, MemoryStore] = {}  # noqa: RUF012 - the one registry of named stores, on purpose
    _named_lock = threading.Lock()

    def __init__(self, name: str = "anonymous") -> None:
        self.uri = f"memory://{name}"
        self._objects: dict[str, tuple[bytes, ObjectInfo]] = {}
        self._lock = threading.RLock()
        self._writes = 0

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        """Return the store of that name, made on first use."""
        with cls._named_lock:
            return cls._named.setdefault(name, cls(name))

    def _find(self, key: str) -> tuple[bytes, ObjectInfo]:
        check_key(key)
        with self._lock:
            if key not in self._objects:
                raise NotFound(f"{key}: no such object in {self.uri}", key=key)
            return self._objects[key]

    def _write(self, key: str, data: Data) -> ObjectInfo:
        self._writes += 1
        content = bytes(data)
        etag = f"{hashlib.sha256(content).hexdigest()[:24]}-{self._writes}"
        info = ObjectInfo(key, len(content), etag, time.time())
        self._objects[key] = (content, info)
        return info

    @override
    def head(self, key: str) -> ObjectInfo:
        return self._find(key)[1]

    @override
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        data, info = self._find(key)
        check_limit(key, info.size_bytes, max_bytes)
        return data

    @override
    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._find(key)[0][start : start + length]

    @override
    @contextmanager
    def open(self, key: str, *, start: int = 0) -> Iterator[Opened]:
        data, info = self._find(key)
        offsets = range(start, len(data), _PIECE_BYTES)
        yield Opened(info.size_bytes, info.etag, start, (data[offset : offset + _PIECE_BYTES] for offset in offsets))

    @override
    def put(self, key: str, data: Data, *, mode: PutMode) -> ObjectInfo:
        check_key(key)
        with self._lock:
            if mode == "create" and key in self._objects:
                raise AlreadyExists(f"{key}: already in {self.uri}", key=key)
            return self._write(key, data)

    @override
    def put_if_match(self, key: str, data: Data, *, etag: str) -> ObjectInfo:
        check_key(key)
        with self._lock:
            current = self._objects[key][1].etag if key in self._objects else None
            if current != etag:
                raise PreconditionFailed(f"{key}: ETag is {current}, expected {etag}", key=key)
            return self._write(key, data)

    @override
    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    @override
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            infos = sorted(
                (info for key, (_, info) in self._objects.items() if key.startswith(prefix)), key=lambda info: info.key
            )
        yield from infos

    @override
    def folders(self, prefix: str = "") -> Iterator[str]:
        with self._lock:
            rests = [key[len(prefix) :] for key in self._objects if key.startswith(prefix)]
        yield from sorted({rest.partition("/")[0] for rest in rests if "/" in rest})
