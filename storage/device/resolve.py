"""From a name to a manifest to rely on: well formed, free of contradictions, standing where it says it stands."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from storage.device.cache import forms_of
from storage.device.errors import DeviceError, SourceDenied, SourceNotFound
from storage.device.source import Documents
from storage.digest import digest_bytes
from storage.errors import InvalidManifest, VersionDeleted
from storage.layout import MAX_VERSION, manifest_key, tag_key
from storage.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from storage.references import (
    TOMBSTONE_MAX_BYTES,
    TagRecord,
    check_not_deleted,
    check_tagged,
    parse_digest,
    parse_version,
    read_tag_state,
    read_tombstone,
)


@dataclass(frozen=True, slots=True)
class Release:
    """One version of one model, checked. ``raw``: the manifest's bytes, of which ``digest`` is the SHA-256."""

    manifest: Manifest
    digest: str
    raw: bytes
    signed: bool


def resolve_unsigned(documents: Documents, name: str, ref: str) -> Release:
    """Resolve a tag, number or digest by the store's word alone: digests guard against damage, not against a liar."""
    if (digest := parse_digest(ref)) is not None:
        return _resolve_digest(documents, name, digest)
    version = parse_version(ref)
    if version is not None:
        return parse_release(read_manifest(documents, name, version), name, version, signed=False)
    tag = _read_tag(documents, name, ref)
    release = parse_release(read_manifest(documents, name, tag.version), name, tag.version, signed=False)
    check_tagged(tag, ref, release.digest)
    return release


def read_manifest(documents: Documents, name: str, version: int, *, max_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
    """Read the bytes under a version's number, and no more than ``max_bytes`` of them."""
    try:
        return documents.read(manifest_key(name, version), max_bytes=max_bytes)
    except SourceNotFound as error:
        raise SourceNotFound(f"{name} has no version {version} here; 'nestquant ls' shows what there is") from error


def parse_release(raw: bytes, name: str, version: int, *, signed: bool) -> Release:
    """Check a manifest's bytes; raise ``InvalidManifest`` (which says what is wrong) or ``VersionDeleted``."""
    check_not_deleted(raw, name, version)
    manifest = parse_manifest(raw, name=name, version=version)
    sizes: dict[str, int] = {}
    shards = [shard for group in manifest.groups for shard in group.levels]
    forms = [form for blob in (*manifest.shared_blobs(), *shards) for form in forms_of(blob)]
    for blob in (*forms, *(delta.descriptor for delta in manifest.deltas)):
        if sizes.setdefault(blob.digest, blob.size_bytes) != blob.size_bytes:
            both = f"{sizes[blob.digest]} and {blob.size_bytes} bytes"
            raise InvalidManifest(f"manifest of {name} version {version}: {blob.digest} is said to have {both}")
    return Release(manifest, digest_bytes(raw), raw, signed)


def was_deleted(documents: Documents, name: str, version: int) -> bool:
    """Tell whether a tombstone stands under a version's number; False where that cannot be found out."""
    try:
        raw = documents.read(manifest_key(name, version), max_bytes=TOMBSTONE_MAX_BYTES)
    except DeviceError:  # longer, for it is a manifest; not named by an index of URLs; or out of reach
        return False
    return read_tombstone(raw) is not None


def _resolve_digest(documents: Documents, name: str, digest: str) -> Release:
    """Look for the digest from the tagged version on: downwards, then upwards; numbers have no gap."""
    try:
        newest = _read_tag(documents, name, "latest").version
    except SourceNotFound:
        newest = 0
    for version in itertools.chain(range(newest, 0, -1), range(newest + 1, MAX_VERSION + 1)):
        try:
            raw = read_manifest(documents, name, version)
        except SourceNotFound:
            if version > newest:
                break
            continue  # an index of URLs need not name them all
        if digest_bytes(raw) == digest:
            return parse_release(raw, name, version, signed=False)
        if (tombstone := read_tombstone(raw)) is not None and tombstone.digest == digest:
            raise VersionDeleted(f"{name} version {version}, of the digest {digest}, was deleted; choose another")
    raise SourceNotFound(f"{name} has no version with the digest {digest} here; 'nestquant ls' shows what there is")


def _read_tag(documents: Documents, name: str, tag: str) -> TagRecord:
    plain = tag_key(name, tag)

    def read(key: str, max_bytes: int) -> bytes | None:
        try:
            return documents.read(key, max_bytes=max_bytes)
        except SourceNotFound:
            return None
        except SourceDenied:  # S3 answers 403 where a missing key may not be listed
            if key == plain:
                raise
            return None

    record = read_tag_state(read, name, tag).says()
    if record is None:
        raise SourceNotFound(f"{name} has no tag {tag!r} here; 'nestquant ls' shows what there is")
    return record
