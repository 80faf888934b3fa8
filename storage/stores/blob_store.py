"""The one contract that all stores keep: bytes under names, with writes that create only, or compare and swap.

What a caller may rely on, whatever the store:

* ``put`` is atomic: a reader sees the whole object or none, never a part.
* ``put(mode="create")`` succeeds for at most one of any number of writers, and raises `AlreadyExists` for the others.
  An S3 server may break this promise; `storage.stores.doctor` finds out.
* After `StoreUnavailable` or `WriteConflict` a write may or may not have landed: read back.
* ``list`` may lag behind on a bad store. Nothing on the way of publishing or pulling depends on it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.digest import Data
from storage.errors import BadKey, NotFound, PreconditionFailed, TooLarge

PutMode = Literal["create", "overwrite"]

MAX_KEY_BYTES = 900  # S3 allows 1024 with the prefix
MAX_SEGMENT_BYTES = 200  # file systems allow 255, and a temporary name must fit beside it

# Lower case only: two keys never fall together on a file system that ignores case.
_SEGMENT = re.compile(r"[a-z0-9](?:[a-z0-9._=+-]*[a-z0-9_=+-])?")
_DEVICE_NAMES = {"con", "prn", "aux", "nul"} | {f"{name}{i}" for name in ("com", "lpt") for i in range(10)}


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says about an object.

    Key, length in bytes, ETag (opaque, without quotes), time of the last write by the store's clock.
    """

    key: str
    size_bytes: int
    etag: str
    modified_s: float


@dataclass(frozen=True, slots=True)
class Opened:
    """An object being read: the length in bytes and the ETag of the whole of it, and its bytes from ``start`` on, in
    pieces of at most 1 MiB.
    """

    size_bytes: int
    etag: str
    start: int
    pieces: Iterator[bytes]


def check_key(key: str) -> str:
    """Return ``key``, or raise `BadKey`.

    Relative, ``/``-separated segments of lower-case ASCII, no ``..``, no device names.
    """
    segments = key.split("/")
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            raise BadKey(
                f"key {key!r}: segment {segment!r} must be of a-z 0-9 . _ = + -, a letter or digit first",
                key=key,
            )
        if segment.partition(".")[0] in _DEVICE_NAMES:
            raise BadKey(f"key {key!r}: {segment!r} is a device name on some systems; choose another", key=key)
        if len(segment) > MAX_SEGMENT_BYTES:
            raise BadKey(
                f"key {key!r}: a segment of {len(segment)} bytes, at most {MAX_SEGMENT_BYTES} allowed", key=key
            )
    if len(key) > MAX_KEY_BYTES:
        raise BadKey(f"key of {len(key)} bytes, at most {MAX_KEY_BYTES} allowed: {key[:80]!r}...", key=key)
    return key


def is_key(text: str) -> bool:
    """Tell whether a listed name is a key of ours; foreign objects under the prefix are left alone."""
    try:
        check_key(text)
    except BadKey:
        return False
    return True


def check_limit(key: str, size_bytes: int, max_bytes: int | None) -> None:
    """Raise `TooLarge` where an object of ``size_bytes`` is more than the caller allows."""
    if max_bytes is not None and size_bytes > max_bytes:
        raise TooLarge(key, limit_bytes=max_bytes, seen_bytes=size_bytes)


class BlobStore(ABC):
    """A flat space of keys.

    Every method may raise `AccessDenied` or `StoreUnavailable`; keys are checked by `check_key`.

    Stores are safe to share between threads. Between processes, hand over the ``uri`` and open it again.
    """

    uri: str

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Return size and ETag. Raises `NotFound`."""

    @abstractmethod
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """Return the whole object. Raises `NotFound`, and `TooLarge` before reading more than ``max_bytes``."""

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return bytes ``start`` to ``start + length``, fewer at the end of the object, none beyond it.

        Raises `NotFound`.
        """

    @abstractmethod
    def open(self, key: str, *, start: int = 0) -> AbstractContextManager[Opened]:
        """Open the object from byte ``start`` on with one request; nothing comes from beyond its end.

        Raises `NotFound`; the pieces raise `PreconditionFailed` where the object ceases to be the one that was opened.
        """

    def stream(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[bytes]:
        """Yield the object from byte ``start`` on, in pieces of at most 1 MiB.

        Raises `NotFound`, and `PreconditionFailed` where the object is not (or ceases to be, after an interruption) the
        one that ``etag`` names.
        """
        with self.open(key, start=start) as opened:
            if etag is not None and opened.etag != etag:
                raise PreconditionFailed(f"{key}: ETag is {opened.etag}, expected {etag}; it was replaced", key=key)
            yield from opened.pieces

    @abstractmethod
    def put(self, key: str, data: Data, *, mode: PutMode) -> ObjectInfo:
        """Write a whole object. ``create`` raises `AlreadyExists` (or `WriteConflict`) where the key is taken.

        Raises `NoSpace`.
        """

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Write a file's bytes as ``put`` with ``overwrite`` does.

        A store that keeps objects outside this process holds no more than a part of them in memory.
        """
        return self.put(key, path.read_bytes(), mode="overwrite")

    @abstractmethod
    def put_if_match(self, key: str, data: Data, *, etag: str) -> ObjectInfo:
        """Replace the object that ``etag`` names. Raises `PreconditionFailed` where it is another one or gone."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error where there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with ``prefix`` (a plain string prefix), in the order of their keys."""

    @abstractmethod
    def folders(self, prefix: str = "") -> Iterator[str]:
        """Yield, in order, the distinct next segments below ``prefix``, which is empty or ends with ``/``.

        The folders, not the objects.
        """

    def exists(self, key: str) -> bool:
        """Tell whether there is an object under ``key``."""
        try:
            self.head(key)
        except NotFound:
            return False
        return True
