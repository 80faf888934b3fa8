"""What a store really does: each promise that this project relies on, tried out on the store itself.

Works under ``doctor/`` and cleans up behind itself. Takes some 60 requests and 10 MiB of traffic on an S3 store.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from storage.errors import Corrupt, NotFound, StorageError
from storage.stores.blob_store import BlobStore
from storage.stores.capabilities import PROBE_PREFIX, Race, race_create, race_swap
from storage.stores.s3 import S3Store

Status = Literal["ok", "warn", "fail"]

_SKEW_WARN_S, _SKEW_FAIL_S = 60.0, 900.0  # S3 refuses signatures that are 15 minutes off


@dataclass(frozen=True, slots=True)
class Check:
    """One promise and whether it holds. ``fail``: publishing is not safe or not possible; ``warn``: we do without."""

    name: str
    status: Status
    detail: str


def diagnose(store: BlobStore) -> list[Check]:
    """Return every check in order; where the store cannot be reached at all, that one alone."""
    folder = f"{PROBE_PREFIX}{uuid.uuid4().hex}/"
    reached = _run("reachable", lambda: _reach(store, folder))
    if reached.status == "fail":
        return [reached]
    checks: list[tuple[str, Callable[[], tuple[Status, str]]]] = [
        ("read after write", lambda: _read_after_write(store, folder)),
        ("clock", lambda: _clock(store, folder)),
        ("range reads", lambda: _ranges(store, folder)),
        ("list after write", lambda: _listing(store, folder)),
        ("create-only", lambda: _raced(race_create(store), "fail", "publishing is refused without --single-writer")),
        ("compare-and-swap", lambda: _raced(race_swap(store), "warn", "nothing here depends on it")),
    ]
    if isinstance(store, S3Store):
        checks += [("checksums", lambda: _checksums(store, folder)), ("multipart", lambda: _multipart(store, folder))]
    try:
        return [reached, *(_run(name, check) for name, check in checks)]
    finally:
        for leftover in store.list(folder):
            store.delete(leftover.key)


def _run(name: str, check: Callable[[], tuple[Status, str]]) -> Check:
    try:
        return Check(name, *check())
    except StorageError as error:
        return Check(name, "fail", str(error))


def _reach(store: BlobStore, folder: str) -> tuple[Status, str]:
    # LIST tells a missing bucket from a missing object, HEAD does not; PUT tells whether we may write.
    next(store.list(folder), None)
    begin_s = time.perf_counter()
    store.put(f"{folder}reach", b"", mode="overwrite")
    return "ok", f"credentials and bucket hold; a small write takes {(time.perf_counter() - begin_s) * 1000:.0f} ms"


def _read_after_write(store: BlobStore, folder: str) -> tuple[Status, str]:
    key = f"{folder}read"
    for round_number in range(3):
        data = os.urandom(1 << 16)
        etag = store.put(key, data, mode="overwrite").etag
        if store.get(key) != data or store.head(key).etag != etag:
            return "fail", f"write {round_number + 1} of one key was not what came back"
    store.delete(key)
    try:
        store.head(key)
    except NotFound:
        return "ok", "3 overwrites read back at once, gone after delete"
    return "fail", "the object is still there after delete"


def _clock(store: BlobStore, folder: str) -> tuple[Status, str]:
    before_s = time.time()
    store.put(f"{folder}clock", b"", mode="overwrite")
    after_s = time.time()
    seen_s = store.head(f"{folder}clock").modified_s
    # Object times are whole seconds on S3, hence the second of tolerance below.
    skew_s = max(0.0, before_s - 1.0 - seen_s, seen_s - after_s)
    status: Status = "fail" if skew_s > _SKEW_FAIL_S else "warn" if skew_s > _SKEW_WARN_S else "ok"
    return status, f"differs by {skew_s:.0f} s" + ("" if status == "ok" else "; set this machine's clock (NTP)")


def _ranges(store: BlobStore, folder: str) -> tuple[Status, str]:
    key, data = f"{folder}range", os.urandom(1 << 16)
    store.put(key, data, mode="overwrite")
    for start, length in ((0, 1), (1000, 5000), (len(data) - 1, 1), (len(data) - 1, 99), (len(data), 1)):
        if store.get_range(key, start, length) != data[start : start + length]:
            return "fail", f"{length} bytes from {start} are not what was written"
    return "ok", "exact at both ends and beyond"


def _listing(store: BlobStore, folder: str) -> tuple[Status, str]:
    keys = [f"{folder}list/{number}" for number in range(5)]
    for key in keys:
        store.put(key, b"", mode="overwrite")
    if [info.key for info in store.list(f"{folder}list/")] != keys:
        return "warn", "LIST lags behind writes; wait before gc, publishing does not depend on it"
    for key in keys:
        store.delete(key)
    if list(store.list(f"{folder}list/")):
        return "warn", "LIST shows deleted objects; wait before gc, publishing does not depend on it"
    return "ok", "5 writes and 5 deletes seen at once"


def _raced(race: Race, otherwise: Status, consequence: str) -> tuple[Status, str]:
    return ("ok", race.detail) if race.holds else (otherwise, f"{race.detail}; {consequence}")


def _checksums(store: S3Store, folder: str) -> tuple[Status, str]:
    wrong = base64.b64encode(hashlib.md5(b"other bytes", usedforsecurity=False).digest()).decode()
    try:
        store.put_with_md5(f"{folder}checksum", b"these bytes", wrong)
    except Corrupt:
        return "ok", "a wrong Content-MD5 is refused"
    return "warn", "a wrong Content-MD5 is accepted: damage on the way in is found by our SHA-256, but only when read"


def _multipart(store: S3Store, folder: str) -> tuple[Status, str]:
    small = S3Store(store.bucket, store.prefix, replace(store.options, multipart_bytes=1), uri=store.uri)
    data = os.urandom(9 << 20)
    small.put(f"{folder}multipart", data, mode="overwrite")
    if small.get(f"{folder}multipart") != data:
        return "fail", "two parts did not come back as they were sent"
    return "ok", "two parts came back as they were sent"
