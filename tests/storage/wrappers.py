"""Stores that misbehave: a wrapper that hears of every operation before and after it, and may raise."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from storage.digest import Data
from storage.errors import StorageError
from storage.stores.blob_store import BlobStore, ObjectInfo, Opened, PutMode


@dataclass(frozen=True)
class Step:
    """One operation that reached a store."""

    operation: str
    key: str


class WatchedStore(BlobStore):
    """Passes everything on to ``inner``; keeps ``steps``; `before` and `after` are there to be overridden."""

    def __init__(self, inner: BlobStore) -> None:
        self.inner = inner
        self.uri = f"watched://{uuid.uuid4().hex}"  # capabilities are remembered by URI
        self.steps: list[Step] = []
        self._lock = threading.Lock()

    def before(self, index: int, step: Step) -> None:
        """Hear of step ``index`` before it is done."""

    def after(self, index: int, step: Step) -> None:
        """Hear of step ``index`` once it is done, or refused by the store."""

    def written(self) -> list[str]:
        """Return the keys of all writes so far."""
        return [step.key for step in self.steps if step.operation in ("put", "put_if_match", "delete")]

    @contextmanager
    def _step(self, operation: str, key: str) -> Iterator[None]:
        step = Step(operation, key)
        with self._lock:
            index = len(self.steps)
            self.steps.append(step)
        self.before(index, step)
        try:
            yield
        except StorageError:
            self.after(index, step)
            raise
        self.after(index, step)

    @override
    def head(self, key: str) -> ObjectInfo:
        with self._step("head", key):
            return self.inner.head(key)

    @override
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        with self._step("get", key):
            return self.inner.get(key, max_bytes=max_bytes)

    @override
    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._step("get_range", key):
            return self.inner.get_range(key, start, length)

    @override
    @contextmanager
    def open(self, key: str, *, start: int = 0) -> Iterator[Opened]:
        with self._step("open", key), self.inner.open(key, start=start) as opened:
            yield opened

    @override
    def put(self, key: str, data: Data, *, mode: PutMode) -> ObjectInfo:
        with self._step("put", key):
            return self.inner.put(key, data, mode=mode)

    @override
    def put_if_match(self, key: str, data: Data, *, etag: str) -> ObjectInfo:
        with self._step("put_if_match", key):
            return self.inner.put_if_match(key, data, etag=etag)

    @override
    def delete(self, key: str) -> None:
        with self._step("delete", key):
            self.inner.delete(key)

    @override
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._step("list", prefix):
            yield from self.inner.list(prefix)

    @override
    def folders(self, prefix: str = "") -> Iterator[str]:
        with self._step("folders", prefix):
            yield from self.inner.folders(prefix)


class FailsAt(WatchedStore):
    """Raises ``error`` at step ``index``, before or after it is done; every other step goes through."""

    def __init__(self, inner: BlobStore, index: int, when: Literal["before", "after"], error: BaseException) -> None:
        super().__init__(inner)
        self._index, self._when, self._error = index, when, error

    @override
    def before(self, index: int, step: Step) -> None:
        if index == self._index and self._when == "before":
            raise self._error

    @override
    def after(self, index: int, step: Step) -> None:
        if index == self._index and self._when == "after":
            raise self._error
