"""Whether what lies in a cache is still what its digest says: disks and memory cards forget single bits."""

from __future__ import annotations

import hashlib
import os

from storage.device.cache import Cache, Installed, blobs_of, forms_of
from storage.device.errors import NotInstalled
from storage.device.files import disk_errors, is_file
from storage.errors import StorageError
from storage.manifest import Descriptor
from storage.wording import system_text

_BLOCK_BYTES = 1 << 20


def fault(cache: Cache, blob: Descriptor) -> str | None:
    """Hash a blob from its first byte to its last; return what is wrong with it in one line, None where it is right."""
    blob = cache.form(blob) or blob
    path = cache.blob_path(blob.digest)
    if not is_file(path):
        return f"{blob.digest}: {'no file under its name' if os.path.lexists(path) else 'missing'}"
    hasher, size_bytes = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                hasher.update(block)
                size_bytes += len(block)
    except OSError as error:  # a bad sector: as good as wrong bytes
        return f"{blob.digest}: cannot be read after {size_bytes} bytes ({system_text(error)})"
    if size_bytes != blob.size_bytes:
        return f"{blob.digest}: {size_bytes} bytes, expected {blob.size_bytes}"
    actual = f"sha256:{hasher.hexdigest()}"
    return None if actual == blob.digest else f"{blob.digest}: the file's SHA-256 is {actual}"


def drop(cache: Cache, blob: Descriptor) -> None:
    """Delete a blob that is not right, so that it is brought anew; for the holder of the lock."""
    for form in forms_of(blob):
        path = cache.blob_path(form.digest)
        with disk_errors(str(path)):
            if is_file(path):
                path.unlink()


def inventory(cache: Cache, name: str) -> tuple[list[Installed], list[Descriptor], list[str]]:
    """Return what may come into use of a model: its versions, the blobs of all of them, and what cannot be read.

    The version in use stands first, then the one to go back to, each at its level.
    """
    state = cache.state(name)
    if state.current is None:
        raise NotInstalled(f"{name} is not in {cache.root}; pull it first")
    versions = [version for version in (state.current, state.previous) if version is not None]
    blobs: dict[str, Descriptor] = {}
    faults = []
    for version in versions:
        try:
            manifest = cache.manifest(name, version)
        except StorageError as error:
            faults.append(f"version {version.version}: {error}")
        else:
            blobs |= {blob.digest: blob for blob in blobs_of(manifest, version.level)}
    return versions, list(blobs.values()), faults
