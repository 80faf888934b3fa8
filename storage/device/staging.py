"""The bytes of one blob under way: hashed as they are written, hashed again before they are continued."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.device.cache import Cache
from storage.device.errors import CacheError, ContentError
from storage.device.files import disk_errors, is_file, make_folder, open_file, read_file
from storage.manifest import Descriptor

_BLOCK_BYTES = 1 << 18
_MAX_ETAG_BYTES = 8192


class Staged:
    """``have`` bytes of ``blob``, written and hashed. ``etag``: the strong entity tag they came under, if any."""

    def __init__(self, file: BinaryIO, path: Path, blob: Descriptor) -> None:
        self._file, self._path, self._blob = file, path, blob
        self._etag_path = path.with_suffix(".etag")
        self._hasher = hashlib.sha256()
        self.have = 0
        with disk_errors(str(path)):
            if os.fstat(file.fileno()).st_size > blob.size_bytes:
                file.truncate(0)  # more than the blob has cannot be a part of it
            while block := file.read(_BLOCK_BYTES):
                self._hasher.update(block)
                self.have += len(block)
            self.etag = self._read_etag() if self.have else None

    def served_under(self, etag: str | None) -> None:
        """Remember the entity tag of the bytes that follow."""
        if etag != self.etag:
            with disk_errors(str(self._etag_path)), open_file(self._etag_path) as file:
                file.truncate()
                file.write((etag or "").encode())
            self.etag = etag

    def _read_etag(self) -> str | None:
        """Return the tag that was kept; None where there is none, or what is there is none."""
        if not is_file(self._etag_path):
            return None
        with contextlib.suppress(UnicodeDecodeError, CacheError):
            return read_file(self._etag_path, max_bytes=_MAX_ETAG_BYTES).decode() or None
        return None

    def restart(self) -> None:
        """Forget every byte."""
        with disk_errors(str(self._path)):
            self._file.seek(0)
            self._file.truncate()
        self._hasher, self.have = hashlib.sha256(), 0

    def write(self, chunk: bytes) -> None:
        """Append ``chunk``, and never a byte beyond the blob's length."""
        if self.have + len(chunk) > self._blob.size_bytes:
            raise ContentError(
                f"{self._blob.digest}: more than the {self._blob.size_bytes} bytes that the manifest says"
            )
        with disk_errors(str(self._path)):
            view = memoryview(chunk)
            while view:
                view = view[self._file.write(view) :]
        self._hasher.update(chunk)
        self.have += len(chunk)

    def check(self) -> None:
        """Compare with the digest and flush to the disk; raise ``ContentError`` for other bytes."""
        actual = f"sha256:{self._hasher.hexdigest()}"
        if actual != self._blob.digest:
            raise ContentError(f"{self._blob.digest}: {self.have} bytes came, their SHA-256 is {actual}")
        with disk_errors(str(self._path)):
            os.fsync(self._file.fileno())


@contextmanager
def staging(cache: Cache, blob: Descriptor) -> Iterator[Staged]:
    """Open what is staged of ``blob``, empty where there is nothing."""
    path = cache.part_path(blob.digest)
    with disk_errors(str(path)):
        make_folder(cache.root, path.parent)
        file = open_file(path)
    with file:
        yield Staged(file, path, blob)
