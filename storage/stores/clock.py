"""What time it is where the bytes lie: ages and signatures are judged by the store's clock, not by ours."""

from __future__ import annotations

from storage.layout import CLOCK_KEY
from storage.stores.blob_store import BlobStore


def store_time_s(store: BlobStore) -> float:
    """Return the store's time in seconds since 1970, as it dates an object written now."""
    store.put(CLOCK_KEY, b"", mode="overwrite")
    return store.head(CLOCK_KEY).modified_s
