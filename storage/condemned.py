"""The blobs that gc means to remove: written by `storage.retention`, heeded by `storage.registry`."""

from __future__ import annotations

from pydantic import Field

from storage.document import parse_record
from storage.errors import Corrupt, NotFound
from storage.layout import CONDEMNED_KEY
from storage.manifest import Record, canonical_json
from storage.stores.blob_store import BlobStore

_MAX_BYTES = 1 << 30


class _Condemned(Record):
    """Blob key -> time (seconds since 1970, by the store's clock) at which no version named it."""

    blobs: dict[str, float] = Field(default_factory=dict)


def read_condemned(store: BlobStore) -> dict[str, float]:
    """Return the blobs that runs of gc have condemned, and since when."""
    try:
        raw = store.get(CONDEMNED_KEY, max_bytes=_MAX_BYTES)
    except NotFound:
        return {}
    try:
        return parse_record(raw, _Condemned).blobs
    except ValueError as error:
        raise Corrupt(CONDEMNED_KEY, expected="gc's list of blobs", seen=str(error)) from error


def write_condemned(store: BlobStore, blobs: dict[str, float]) -> None:
    """Replace the list."""
    store.put(CONDEMNED_KEY, canonical_json(_Condemned(blobs=blobs)), mode="overwrite")
