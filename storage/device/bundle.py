"""A version in one file, for devices without a network: a tar of the very objects that a device would read online.

    bundle.json                                  name, version, digest, level: what a pull takes if nothing is said
    trust/..., models/<name>/trust/...           the signed documents, where the model is signed
    models/<name>/tags/<tag>.json                the tags that name the version
    models/<name>/versions/<8 digits>.json       the manifest
    blobs/sha256/...                             base and shards, in fetching order, up to the level

Nothing in it is believed for its own sake: it is one more source, and everything is verified as it is online. A bundle
is written and read block by block, and its bytes follow from what it holds alone.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import Field

from storage.device.cache import blobs_of
from storage.device.errors import DeviceError, SourceError, SourceNotFound
from storage.device.files import disk_errors
from storage.device.presign import trust_keys_of
from storage.device.source import Body
from storage.digest import digest_bytes
from storage.document import parse_record
from storage.errors import Corrupt
from storage.files import open_regular
from storage.layout import blob_key, manifest_key, tag_key
from storage.manifest import Digest, ModelName, Record, canonical_json
from storage.registry import Registry, Resolved
from storage.stores.blob_store import BlobStore, is_key
from storage.wording import system_text

CONTENTS = "bundle.json"
_BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 18
_MAX_CONTENTS_BYTES = 4096
_MAX_MEMBERS = 100_000


class Contents(Record):
    """What a bundle says that it holds. ``level``: the highest level whose shards are in it."""

    schema_version: Literal[1] = 1
    name: ModelName
    version: int = Field(ge=1)
    digest: Digest
    level: int = Field(ge=0)


@dataclass(frozen=True, slots=True)
class Written:
    """A bundle as written: its contents, its length, and whether the signed documents are in it."""

    contents: Contents
    size_bytes: int
    signed: bool


def write_bundle(
    store: BlobStore, name: str, ref: str, out: Path, *, level: int | None = 0, timestamp: bytes | None = None
) -> Written:
    """Write a version up to ``level`` (None: all of it) into a file, which gets its name when it is whole.

    ``timestamp``: a signed one to take in the place of the store's (`storage.signing.metadata.lasting_timestamp`).

    Raises:
        storage.StorageError: something is not there, or is not what its digest says.
        SigningError: the model is signed, and the version is not.
        DeviceError: there is no such level. CacheError, NoSpace: the file cannot be written.
    """
    registry = Registry(store)
    version = registry.resolve(name, ref)
    levels = version.manifest.level_count()
    if level is not None and not 0 <= level < levels:
        raise DeviceError(f"{name} version {version.version} has levels 0 to {levels - 1}, not {level}")
    top = levels - 1 if level is None else level
    contents = Contents(name=name, version=version.version, digest=version.digest, level=top)
    signed_documents = _signed_documents(store, name, version, timestamp)
    documents = signed_documents + _plain_documents(registry, name, version)
    part = out.with_name(f"{out.name}.part")
    with disk_errors(str(out)):
        try:
            with part.open("wb") as file:
                for key, raw in [(CONTENTS, canonical_json(contents)), *documents]:
                    _add(file, key, len(raw), iter([raw]), digest_bytes(raw))
                for blob in blobs_of(version.manifest, top):
                    key = blob_key(blob.digest)
                    _add(file, key, blob.size_bytes, store.stream(key), blob.digest)
                file.write(bytes(2 * _BLOCK))
                file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
                size_bytes = file.tell()
                file.flush()
                os.fsync(file.fileno())
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    return Written(contents, size_bytes, bool(signed_documents))


def documents_of(store: BlobStore, name: str, resolved: Resolved) -> list[tuple[str, bytes]]:
    """Return keys and bytes of all that a device reads of a version before its blobs.

    Those that are signed, the tags that name it, the manifest. Raises as ``write_bundle`` does.
    """
    return _signed_documents(store, name, resolved, None) + _plain_documents(Registry(store), name, resolved)


def _plain_documents(registry: Registry, name: str, resolved: Resolved) -> list[tuple[str, bytes]]:
    tags = [tag for tag, version in registry.tags(name).items() if version == resolved.version]
    documents = [(tag_key(name, tag), canonical_json(registry.read_tag(name, tag))) for tag in tags]
    return [*documents, (manifest_key(name, resolved.version), resolved.raw)]


def _signed_documents(
    store: BlobStore, name: str, resolved: Resolved, timestamp: bytes | None
) -> list[tuple[str, bytes]]:
    from storage.signing.keys import SigningError  # python-tuf, which an unsigned bundle does without
    from storage.signing.metadata import MAX_TARGETS_BYTES, newest_edition, trust_key
    from storage.signing.root import newest_root
    from storage.signing.staging import newest_targets

    edition = newest_edition(store, name)
    if not edition:
        return []
    key = manifest_key(name, resolved.version)
    target = newest_targets(store, name).get(key)
    if target is None or f"sha256:{target.hashes.get('sha256')}" != resolved.digest:
        raise SigningError(f"{name} is signed, and version {resolved.version} is not; sign it, then bundle it")
    keys = trust_keys_of(name, edition=edition, root_version=newest_root(store).signed.version)
    own = {trust_key(name, "timestamp"): timestamp} if timestamp is not None else {}
    return [(one, own.get(one) or store.get(one, max_bytes=MAX_TARGETS_BYTES)) for one in keys]


def _add(file: BinaryIO, key: str, size_bytes: int, pieces: Iterator[bytes], digest: str) -> None:
    """Append one member; its bytes are checked as they pass. Raises ``Corrupt``."""
    info = tarfile.TarInfo(key)
    info.size, info.mode = size_bytes, 0o644
    try:
        file.write(info.tobuf(format=tarfile.USTAR_FORMAT, encoding="ascii"))
    except ValueError as error:
        raise DeviceError(f"{key}: {size_bytes} bytes do not fit into a bundle ({error})") from error
    hasher, have = hashlib.sha256(), 0
    for piece in pieces:
        have += len(piece)
        if have > size_bytes:
            break
        hasher.update(piece)
        file.write(piece)
    actual = f"sha256:{hasher.hexdigest()}"
    if (have, actual) != (size_bytes, digest):
        raise Corrupt(key, expected=f"{size_bytes} bytes with {digest}", seen=f"{have} bytes with {actual}")
    file.write(bytes(-size_bytes % _BLOCK))


class BundleSource:
    """Reads a bundle as a source. Its list of members is read once; bytes come block by block, from where it is asked.

    The file is opened anew for each object, so that a stick that was pulled and put back is found again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members = _members(path)

    def contents(self) -> Contents:
        """Return what the bundle says that it holds. Raises ``SourceError``."""
        with self.open(CONTENTS) as body:
            if (body.total_bytes or 0) > _MAX_CONTENTS_BYTES:
                raise _broken(self.path, f"{CONTENTS} has {body.total_bytes} bytes")
            raw = b"".join(body.chunks)
        try:
            return parse_record(raw, Contents)
        except ValueError as error:
            raise _broken(self.path, f"{CONTENTS}: {error}") from error

    @contextmanager
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        """Open ``key`` from ``start`` on, whatever the entity tag: a blob's digest is the judge."""
        place = self._members.get(key)
        if place is None:
            raise SourceNotFound(f"{self.path} has no {key}; was it made for this version and level?")
        offset, size_bytes = place
        with _stick_errors(self.path):
            file = open_regular(self.path)
        with file:
            yield Body(start, size_bytes, None, self._read(file, key, offset + start, size_bytes - start))

    def _read(self, file: BinaryIO, key: str, offset: int, count: int) -> Iterator[bytes]:
        with _stick_errors(self.path):
            file.seek(offset)
        while count > 0:
            with _stick_errors(self.path):
                chunk = file.read(min(_CHUNK_BYTES, count))
            if not chunk:
                raise _broken(self.path, f"it ends within {key}")
            count -= len(chunk)
            yield chunk


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Return where each object's bytes begin and how many there are; only plain files of our names are let in.

    Headers alone are read, and none of the extensions that make a reader take a header's word for a length of memory.
    """
    members: dict[str, tuple[int, int]] = {}
    with _stick_errors(path), open_regular(path) as file:
        end = os.fstat(file.fileno()).st_size
        at = 0
        while True:
            file.seek(at)
            header = file.read(_BLOCK)
            if header == bytes(_BLOCK):
                return members
            try:
                info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
            except (tarfile.HeaderError, ValueError) as error:
                raise _broken(path, f"no member at byte {at} ({error})") from error
            if info.type != tarfile.REGTYPE or not is_key(info.name) or info.name in members or info.size < 0:
                raise _broken(path, f"{info.name[:200]!r} at byte {at} is no object of a bundle")
            if at + _BLOCK + info.size > end or len(members) >= _MAX_MEMBERS:
                raise _broken(path, f"{info.name} does not fit: {info.size} bytes from byte {at + _BLOCK} of {end}")
            members[info.name] = (at + _BLOCK, info.size)
            at += _BLOCK + -(-info.size // _BLOCK) * _BLOCK


def _broken(path: Path, why: str) -> SourceError:
    return SourceError(f"{path} is no whole bundle: {why}; copy it anew", retryable=False)


@contextmanager
def _stick_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{path}: {system_text(error)}; with the bundle in place again, the same command goes on",
            retryable=False,
        ) from error
