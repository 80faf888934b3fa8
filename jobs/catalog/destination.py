"""Where a site is written: a folder, which appears when it is whole, or the store that it tells about."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from jobs.errors import JobError
from storage.errors import AlreadyExists
from storage.layout import CATALOG_PREFIX
from storage.stores.blob_store import BlobStore
from storage.stores.clock import store_time_s

FRONT = "index.html"
MARKER = "catalog.json"


class CatalogError(JobError):
    """The site cannot be written there; the message says why."""


class Destination(Protocol):
    """Takes the files of one site, from several threads; ``finish`` makes them the site."""

    card_name: str

    def put(self, path: str, data: bytes) -> None:
        """Write one file, by its path below the site's top."""

    def put_asset(self, path: str, data: bytes) -> None:
        """Write a file whose path names its bytes."""

    def finish(self, front: bytes, marker: bytes) -> None:
        """Write the front page and the list of models, and leave nothing of an earlier site."""


class SiteFolder:
    """A site in a folder. It is built beside it and takes its place in the end; a failure leaves what was there."""

    card_name = "README.md"

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise CatalogError(f"{folder} is a file; choose a folder.")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise CatalogError(f"{folder} holds something else than a catalogue (no {MARKER}); choose another folder.")
        self.folder = folder.resolve()
        self._part = self.folder.with_name(f"{self.folder.name}.part")
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._part, ignore_errors=True)

    def put(self, path: str, data: bytes) -> None:
        """Write one file."""
        place = self._part / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)

    put_asset = put

    def finish(self, front: bytes, marker: bytes) -> None:
        """Put the folder in its place."""
        self.put(FRONT, front)
        self.put(MARKER, marker)
        old = self.folder.with_name(f"{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        self._part.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


class StoreSite:
    """A site below ``catalog/`` of a store.

    Assets are named by their digests and created once, pages are overwritten whole, the front page last: who reads
    meanwhile gets pages of before and after, none torn and none without its style. What this run did not write, and
    nobody has written since it began, goes in the end; assets stay, since an open page may still ask for them.
    """

    card_name = "readme.md"

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._begun_s = store_time_s(store)
        self._written: set[str] = set()

    def put(self, path: str, data: bytes) -> None:
        """Overwrite one page."""
        key = f"{CATALOG_PREFIX}{path}"
        self._store.put(key, data, mode="overwrite")
        self._written.add(key)

    def put_asset(self, path: str, data: bytes) -> None:
        """Create one file that no run ever writes with other bytes."""
        with suppress(AlreadyExists):
            self._store.put(f"{CATALOG_PREFIX}{path}", data, mode="create")

    def finish(self, front: bytes, marker: bytes) -> None:
        """Write the front page, then remove pages of models and versions that are gone."""
        self.put(MARKER, marker)
        self.put(FRONT, front)
        for info in list(self._store.list(CATALOG_PREFIX)):
            asset = info.key.startswith(f"{CATALOG_PREFIX}assets/")
            # The store's times may be whole seconds: what was written in the second of our start may be a rival's.
            if not asset and info.key not in self._written and info.modified_s < int(self._begun_s):
                self._store.delete(info.key)
