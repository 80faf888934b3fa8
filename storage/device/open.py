"""From a URI to a source: a store's URI, ``https://...``, ``oci://...``, or ``presigned:`` before an index."""

from __future__ import annotations

from pathlib import Path

from storage.device.files import disk_errors
from storage.device.http import HttpClient, HttpSource, PresignedSource, UrlIndex
from storage.device.source import Documents, Source, StoreSource
from storage.stores.uri import open_existing_store

_MAX_INDEX_BYTES = 64 << 20


def open_source(uri: str | Path, *, client: HttpClient | None = None) -> Source:
    """Return the source that ``uri`` names; nothing is contacted yet, but a folder must be there.

    Raises ``BadStoreURI``.

    An ``s3://`` store is read through presigned URLs made on the spot, so that all networks take one path; boto3 (extra
    ``s3``) is imported for it alone.
    """
    text, client = str(uri), client or HttpClient()
    if text.startswith(("https://", "http://")):
        return HttpSource(text, client)
    if text.startswith("oci://"):
        from storage.device.oci import OciSource, Place

        return OciSource(Place.parse(text), client)
    if text.startswith("presigned:"):
        return PresignedSource(UrlIndex(lambda: _read_index(text.removeprefix("presigned:"), client)), client)
    store = open_existing_store(uri)
    if text.startswith("s3://"):
        from storage.device.presign import Presigner
        from storage.stores.s3 import S3Store

        if isinstance(store, S3Store):
            presigner = Presigner(store)
            return PresignedSource(lambda key, _fresh: presigner.url(key), client)
    return StoreSource(store)


def _read_index(place: str, client: HttpClient) -> bytes:
    if place.startswith(("https://", "http://")):
        one = PresignedSource(lambda _key, _fresh: place, client)
        return Documents(one).read("index of presigned URLs", max_bytes=_MAX_INDEX_BYTES)
    with disk_errors(place):
        return Path(place).read_bytes()
