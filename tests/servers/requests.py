"""Counts what really goes to an S3 server: a hook of botocore's own, right before each request is sent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from storage.stores.s3 import S3Store

_KINDS = (
    ("probe of the store", r"doctor/"),
    ("unit record", r"jobs/[0-9a-f]+/units/"),
    ("blob", r"blobs/"),
    ("manifest", r"models/[^/]+/versions/\d+\.json"),
    ("report", r"models/[^/]+/versions/\d+\."),
    ("tag", r"models/[^/]+/tags/"),
    ("entry", r"models/[^/]+/entries/"),
    ("gc's list", r"gc/"),
)


@dataclass(frozen=True)
class Request:
    """One request: botocore's name of the operation, the key without the store's prefix, the bytes of its body."""

    operation: str
    key: str
    sent_bytes: int

    @property
    def kind(self) -> str:
        """What the key stands for."""
        return next((kind for kind, pattern in _KINDS if re.search(pattern, self.key)), self.key)


@dataclass
class Requests:
    """All requests of this process since counting began, retries included."""

    sent: list[Request] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sent)

    def by_kind(self, start: int = 0, stop: int | None = None) -> Counter[tuple[str, str]]:
        """Count by operation and kind of key."""
        return Counter((request.operation, request.kind) for request in self.sent[start:stop])


@contextmanager
def counted() -> Iterator[Requests]:
    """Count the requests of every S3 client that is made from now on."""
    requests, make = Requests(), S3Store._make_client

    def watched(store: S3Store) -> Any:
        client = make(store)

        def heard(request: Any, event_name: str, **_: object) -> None:
            path = unquote(urlsplit(request.url).path)
            _, _, key = path.partition(f"/{store.bucket}/{store.prefix}")
            sent = int(request.headers.get("Content-Length", 0))
            requests.sent.append(Request(event_name.rpartition(".")[2], key, sent))

        client.meta.events.register("before-send.s3", heard)
        return client

    S3Store._make_client = watched  # type: ignore[method-assign]
    try:
        yield requests
    finally:
        S3Store._make_client = make  # type: ignore[method-assign]
