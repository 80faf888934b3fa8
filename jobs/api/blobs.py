"""Where a version's blobs are read from: a store, or one file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage.device.bundle import BundleSource
from storage.device.errors import SourceError
from storage.digest import digest_bytes, verify_bytes
from storage.errors import Corrupt
from storage.layout import blob_key, manifest_key
from storage.manifest import MAX_MANIFEST_BYTES, Descriptor, Manifest, parse_manifest
from storage.registry import Registry
from workers.errors import ArtifactError


@dataclass(frozen=True)
class StoreBlobs:
    """Blobs of a store, verified as they are read."""

    registry: Registry

    def read(self, blob: Descriptor, /) -> bytes:
        """Return a blob's bytes. Raises ``storage.StorageError``."""
        return self.registry.get_blob(blob)


@dataclass(frozen=True)
class BundleBlobs:
    """Blobs of one file, verified as they are read."""

    source: BundleSource

    def read(self, blob: Descriptor, /) -> bytes:
        """Return a blob's bytes. Raises ``ArtifactError`` and ``storage.StorageError``."""
        key = blob_key(blob.digest)
        data = _read(self.source, key, blob.size_bytes)
        with _copied_anew(self.source.path):
            verify_bytes(key, data, digest=blob.digest, size_bytes=blob.size_bytes)
        return data


def open_bundle(path: Path) -> tuple[Manifest, BundleBlobs]:
    """Return the manifest of a file that ``save`` or ``nestquant bundle`` wrote, verified, and its blobs.

    Raises:
        ArtifactError: it is no such file.
        storage.StorageError: it is damaged.
    """
    try:
        source = BundleSource(path)
        contents = source.contents()
    except SourceError as error:
        raise ArtifactError(f"{error}.") from error
    key = manifest_key(contents.name, contents.version)
    raw = _read(source, key, MAX_MANIFEST_BYTES)
    if digest_bytes(raw) != contents.digest:
        with _copied_anew(path):
            raise Corrupt(key, expected=contents.digest, seen=digest_bytes(raw))
    return parse_manifest(raw, name=contents.name, version=contents.version), BundleBlobs(source)


def _read(source: BundleSource, key: str, most_bytes: int) -> bytes:
    try:
        with source.open(key) as body:
            if (body.total_bytes or 0) > most_bytes:
                raise ArtifactError(
                    f"{source.path}: {key} has {body.total_bytes} bytes, at most {most_bytes} expected."
                )
            return b"".join(body.chunks)
    except SourceError as error:
        raise ArtifactError(f"{error}.") from error


@contextmanager
def _copied_anew(path: Path) -> Iterator[None]:
    try:
        yield
    except Corrupt as error:
        raise ArtifactError(f"{path} is damaged: {error}; copy it anew, or save the model again.") from error
