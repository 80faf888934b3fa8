"""From a name to a manifest to rely on: well formed, free of contradictions, standing where it says it stands."""

from __future__ import annotations

from dataclasses import dataclass

from storage.device.errors import SourceNotFound
from storage.device.source import Documents
from storage.digest import digest_bytes
from storage.document import parse_record
from storage.errors import Corrupt, InvalidManifest, VersionDeleted
from storage.layout import manifest_key, tag_key
from storage.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from storage.registry import TagRecord, read_tombstone

_MAX_TAG_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Release:
    """One version of one model, checked. ``raw``: the manifest's bytes, of which ``digest`` is the SHA-256."""

    manifest: Manifest
    digest: str
    raw: bytes
    signed: bool


def resolve_unsigned(documents: Documents, name: str, ref: str) -> Release:
    """Resolve a tag or version number by the store's word alone: digests guard against damage, not against a liar."""
    version = parse_version(ref)
    if version is not None:
        return parse_release(read_manifest(documents, name, version), name, version, signed=False)
    tag = _read_tag(documents, name, ref)
    release = parse_release(read_manifest(documents, name, tag.version), name, tag.version, signed=False)
    if release.digest != tag.digest:
        key = manifest_key(name, tag.version)
        raise Corrupt(key, expected=f"{tag.digest} (tag {ref!r})", seen=release.digest)
    return release


def parse_version(ref: str) -> int | None:
    """Return the version that ``ref`` names, or None where it is a tag."""
    return int(ref[:20]) if ref.isascii() and ref.isdigit() else None


def read_manifest(documents: Documents, name: str, version: int, *, max_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
    """Read the bytes under a version's number, and no more than ``max_bytes`` of them."""
    try:
        return documents.read(manifest_key(name, version), max_bytes=max_bytes)
    except SourceNotFound as error:
        raise SourceNotFound(f"{name} has no version {version} here; 'nestquant ls' shows what there is") from error


def parse_release(raw: bytes, name: str, version: int, *, signed: bool) -> Release:
    """Check a manifest's bytes; raise ``InvalidManifest`` (which says what is wrong) or ``VersionDeleted``."""
    if read_tombstone(raw) is not None:
        raise VersionDeleted(f"{name} version {version} was deleted; choose another", key=manifest_key(name, version))
    manifest = parse_manifest(raw, name=name, version=version)
    sizes: dict[str, int] = {}
    for blob in [*manifest.base, *(shard for group in manifest.groups for shard in group.levels)]:
        if sizes.setdefault(blob.digest, blob.size_bytes) != blob.size_bytes:
            both = f"{sizes[blob.digest]} and {blob.size_bytes} bytes"
            raise InvalidManifest(f"manifest of {name} version {version}: {blob.digest} is said to have {both}")
    return Release(manifest, digest_bytes(raw), raw, signed)


def _read_tag(documents: Documents, name: str, tag: str) -> TagRecord:
    key = tag_key(name, tag)
    try:
        raw = documents.read(key, max_bytes=_MAX_TAG_BYTES)
        record = parse_record(raw, TagRecord)
    except SourceNotFound as error:
        raise SourceNotFound(f"{name} has no tag {tag!r} here; 'nestquant ls' shows what there is") from error
    except ValueError as error:
        raise InvalidManifest(f"{key}: not a tag: {error}", key=key) from error
    if record.name != name:
        raise InvalidManifest(f"{key}: is a tag of {record.name!r}, expected {name!r}", key=key)
    return record
