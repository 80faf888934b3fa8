"""Where a device reads from: anything that answers "the bytes of this key, from here on".

A source never writes, never lists, and holds one response at a time. Every store is one (``StoreSource``); plain
HTTP(S) and presigned URLs are others (``storage.device.http``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from storage.device.errors import SourceChanged, SourceDenied, SourceError, SourceNotFound
from storage.device.pace import Pace
from storage.device.retry import OnRetry, Retry
from storage.errors import AccessDenied, NotFound, PreconditionFailed, StorageError, StoreUnavailable
from storage.stores.blob_store import BlobStore


@dataclass(frozen=True)
class Body:
    """A response in progress.

    ``start``: where its first byte belongs (0 although a later start was asked: the server sends all again).
    ``total_bytes``: the length of the whole representation where the server says it. ``etag``: a strong entity tag, or
    None. ``chunks``: bytes as they come.
    """

    start: int
    total_bytes: int | None
    etag: str | None
    chunks: Iterator[bytes]


class Source(Protocol):
    """Reads keys. Errors are ``SourceError`` and its kinds, from ``open`` and from the chunks alike."""

    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> AbstractContextManager[Body]:
        """Open ``key`` from ``start`` on, if it is still the representation tagged ``etag``; else from 0."""
        ...


@dataclass(frozen=True)
class Documents:
    """Reads small documents whole, bounded, and again within the retry budget."""

    source: Source
    retry: Retry = field(default_factory=Retry)
    pace: Pace = field(default_factory=Pace)
    on_retry: OnRetry = lambda _message, _wait_s: None

    def read(self, key: str, *, max_bytes: int) -> bytes:
        """Return all bytes of ``key``; never take more than ``max_bytes`` and one chunk of it."""
        return self.retry.run(lambda: self._read(key, max_bytes), self.on_retry)

    def _read(self, key: str, max_bytes: int) -> bytes:
        data = bytearray()
        with self.source.open(key) as body:
            announced = body.total_bytes
            if announced is not None and announced > max_bytes:
                raise SourceError(f"{key}: {announced} bytes announced, at most {max_bytes} accepted", retryable=False)
            for chunk in self.pace.keep(body.chunks, key):
                data += chunk
                if len(data) > max_bytes:
                    raise SourceError(f"{key}: more than the {max_bytes} bytes accepted", retryable=False)
        if announced is not None and len(data) != announced:
            raise SourceError(f"{key}: cut after {len(data)} of {announced} bytes")
        return bytes(data)


@dataclass(frozen=True)
class StoreSource:
    """Reads a ``BlobStore``: what it answers to one GET says length and entity tag, too."""

    store: BlobStore

    @contextmanager
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        """Open ``key``; a changed entity tag starts it over from 0."""
        with ExitStack() as stack:
            with _store_errors(key):
                opened = stack.enter_context(self.store.open(key, start=start))
                if start and etag not in (None, opened.etag):
                    stack.close()
                    opened = stack.enter_context(self.store.open(key))
            yield Body(opened.start, opened.size_bytes, opened.etag, _relay(key, opened.pieces))


def _relay(key: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    with _store_errors(key):
        yield from chunks


@contextmanager
def _store_errors(key: str) -> Iterator[None]:
    try:
        yield
    except NotFound as error:
        raise SourceNotFound(str(error)) from error
    except AccessDenied as error:
        raise SourceDenied(str(error)) from error
    except PreconditionFailed as error:
        raise SourceChanged(str(error)) from error
    except StorageError as error:
        raise SourceError(str(error), retryable=isinstance(error, StoreUnavailable)) from error
