"""Does this store keep its preconditions? Racing writers ask, since neither a vendor's name nor one request tells.

Several servers answer ``200`` to a condition that they ignore; others check it and then let every one of many
simultaneous writers win.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from storage.errors import (
    AlreadyExists,
    NotFound,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
    WriteConflict,
)
from storage.stores.blob_store import BlobStore

PROBE_PREFIX = "doctor/"
_PROBE_KEY = re.compile(r"doctor/[0-9a-f]{32}(/(reach|read|clock|range|list/[0-9]|checksum|multipart))?")
_WRITERS = 8
_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Race:
    """Outcome of ``rounds`` races of ``writers`` on one key.

    ``holds`` where each had one winner, whose bytes are what is read back.
    """

    holds: bool
    writers: int
    rounds: int
    detail: str


_races: dict[str, Race] = {}
_known_lock = threading.Lock()


def is_probe_key(key: str) -> bool:
    """Tell whether a key is exactly one that a race, or one of doctor's checks, writes to."""
    return _PROBE_KEY.fullmatch(key) is not None


def has_create_only(store: BlobStore) -> bool:
    """Tell whether put-if-absent works on this store; raced once per process and URI, some 40 small requests."""
    with _known_lock:
        if store.uri not in _races:
            _races[store.uri] = race_create(store)
        return _races[store.uri].holds


def race_create(store: BlobStore, *, writers: int = _WRITERS, rounds: int = _ROUNDS) -> Race:
    """Let ``writers`` put one absent key at once: exactly one may win, and a later put must fail too."""

    def prepare(key: str) -> Callable[[bytes], object]:
        return lambda data: store.put(key, data, mode="create")

    return _race(store, prepare, writers, rounds, late=AlreadyExists)


def race_swap(store: BlobStore, *, writers: int = _WRITERS, rounds: int = _ROUNDS) -> Race:
    """Let ``writers`` replace one object by its ETag at once.

    Exactly one may win, and a later one with the old ETag must fail too.
    """

    def prepare(key: str) -> Callable[[bytes], object]:
        etag = store.put(key, b"before", mode="overwrite").etag
        return lambda data: store.put_if_match(key, data, etag=etag)

    return _race(store, prepare, writers, rounds, late=PreconditionFailed)


def _race(
    store: BlobStore,
    prepare: Callable[[str], Callable[[bytes], object]],
    writers: int,
    rounds: int,
    *,
    late: type[Exception],
) -> Race:
    for round_number in range(1, rounds + 1):
        key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
        try:
            problem = _one_round(store, key, prepare(key), writers, late)
        finally:
            store.delete(key)
        if problem:
            return Race(holds=False, writers=writers, rounds=round_number, detail=problem)
    return Race(holds=True, writers=writers, rounds=rounds, detail=f"one winner of {writers}, {rounds} times")


def _one_round(
    store: BlobStore, key: str, write: Callable[[bytes], object], writers: int, late: type[Exception]
) -> str:
    barrier, unknown = threading.Barrier(writers), list[StorageError]()

    def attempt(number: int) -> bool | None:
        data = f"writer {number}".encode()
        barrier.wait(timeout=60)
        try:
            write(data)
        except (AlreadyExists, PreconditionFailed):
            return False
        except (StoreUnavailable, WriteConflict) as error:
            unknown.append(error)
            return None  # to be settled by what is read back
        return True

    with ThreadPoolExecutor(writers) as pool:
        outcomes = list(pool.map(attempt, range(writers)))
    winners = [number for number, won in enumerate(outcomes) if won]
    try:
        content = store.get(key, max_bytes=64)
    except NotFound:
        if unknown and not winners:  # nobody could write: that says nothing of who would win
            raise unknown[0] from None
        return f"{len(winners)} of {writers} writers won, but nothing is there"
    if len(winners) > 1:
        return f"{len(winners)} of {writers} writers won"
    # A writer's own retry may have been refused because its first try had landed with the answer lost: then nobody
    # "won", yet one did.
    if winners and content != f"writer {winners[0]}".encode():
        return f"writer {winners[0]} won, but the bytes of {content.decode(errors='replace')!r} are there"
    if not winners and content == b"before":
        return "every writer was refused, the one entitled included"
    return _late_write(write, late)


def _late_write(write: Callable[[bytes], object], late: type[Exception]) -> str:
    try:
        write(b"late")
    except late:
        return ""
    except (AlreadyExists, PreconditionFailed, WriteConflict) as error:
        return f"a late writer met {type(error).__name__}, expected {late.__name__}"
    return "a late writer overwrote the winner"
