"""Numbers that are given out once: the newest found without LIST, the next taken by put-if-absent.

Whoever writes number n + 1 has seen number n, so "is there a number n" is monotone in n. Versions, editions of signed
metadata and the entries of a tag are all numbered so.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from storage.errors import AlreadyExists, NotFound, StoreUnavailable, WriteConflict
from storage.stores.blob_store import BlobStore

_ATTEMPTS = 5
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Taken:
    """Outcome of `take_number`: whether the number is ours, and how many writes it took beyond the first."""

    ours: bool
    retries: int


def newest_number(there: Callable[[int], bool], hint: int = 0) -> int:
    """Return the highest n of which ``there(n)`` holds, 0 where there is none: doubling, then bisecting.

    ``hint``: a number at or below the newest saves requests; one that is not there costs one.
    """
    low = hint if hint and there(hint) else 0
    step = 1
    while there(low + step):
        low += step
        step *= 2
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if there(middle) else (low, middle)
    return low


def take_number(store: BlobStore, key: str, raw: bytes, *, max_bytes: int, create_only: bool = True) -> Taken:
    """Put ``raw`` under a numbered key if it is absent, and settle a refusal or a lost answer by reading back.

    Bytes that are there and are ours are our success, whoever wrote them. ``create_only=False``: for a store without
    put-if-absent and a single writer; the key is looked at, then written.

    Raises:
        AlreadyExists, WriteConflict, StoreUnavailable: the last of several tries, with nothing under the key.
    """
    retries = 0
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            if not create_only and store.exists(key):
                raise AlreadyExists(f"{key}: already in {store.uri}", key=key)
            store.put(key, raw, mode="create" if create_only else "overwrite")
            return Taken(ours=True, retries=retries)
        except (AlreadyExists, WriteConflict, StoreUnavailable) as error:
            # Ours may have landed with its answer lost: only the bytes themselves tell whose number this is.
            try:
                ours = store.get(key, max_bytes=max_bytes) == raw
                return Taken(ours=ours, retries=retries + ours)
            except NotFound:
                retries += 1
                if attempt == _ATTEMPTS:
                    raise error from None
                time.sleep(random.uniform(0, _PAUSE_S * 2**attempt))
    raise AssertionError("unreachable")
