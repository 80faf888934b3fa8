"""The rules of tags, numbers and digests: what a reference means, and which bytes under a tag or number count.

Without I/O, so that the two who read them, a publisher's registry and a device, go by the same ones.
"""

from __future__ import annotations

from typing import Literal

from storage.digest import digest_hex
from storage.document import parse_record
from storage.errors import Corrupt, InvalidManifest, VersionDeleted
from storage.layout import manifest_key, tag_key
from storage.manifest import Digest, ModelName, Record

TOMBSTONE_MAX_BYTES = 512
MAX_TAG_BYTES = 4096


class TagRecord(Record):
    """What a tag says: a version of a name and the digest of its manifest."""

    name: ModelName
    version: int
    digest: Digest


class Tombstone(Record):
    """Stands under the number of a deleted version, so that the number is never given out again.

    ``digest`` is that of the manifest that was there.
    """

    tombstone: Literal[True] = True
    name: ModelName
    version: int
    digest: Digest


def parse_version(ref: str) -> int | None:
    """Return the version that ``ref`` names, or None where it is a tag or a digest."""
    return int(ref[:20]) if ref.isascii() and ref.isdigit() else None


def parse_digest(ref: str) -> str | None:
    """Return the manifest's digest that ``ref`` is, or None where it is a tag or number. Raises ``BadKey``."""
    return f"sha256:{digest_hex(ref)}" if ref.startswith("sha256:") else None


def parse_tag(raw: bytes, name: str, tag: str) -> TagRecord:
    """Return what the bytes of a tag say. Raises `InvalidManifest`."""
    key = tag_key(name, tag)
    try:
        record = parse_record(raw, TagRecord)
    except ValueError as error:
        raise InvalidManifest(f"{key}: not a tag: {str(error).splitlines()[0]}", key=key) from error
    if record.name != name:
        raise InvalidManifest(f"{key}: is a tag of {record.name!r}, expected {name!r}", key=key)
    return record


def check_tagged(record: TagRecord, tag: str, digest: str) -> None:
    """Raise `Corrupt` where the manifest under a tag's number is not the one that was tagged."""
    if digest != record.digest:
        key = manifest_key(record.name, record.version)
        raise Corrupt(key, expected=f"{record.digest} (tag {tag!r})", seen=digest)


def read_tombstone(raw: bytes) -> Tombstone | None:
    """Return the tombstone that ``raw`` is, or None where it is something else."""
    if len(raw) > TOMBSTONE_MAX_BYTES:
        return None
    try:
        return parse_record(raw, Tombstone)
    except ValueError:
        return None


def check_not_deleted(raw: bytes, name: str, version: int) -> None:
    """Raise `VersionDeleted` where a tombstone stands under a version's number."""
    if read_tombstone(raw) is not None:
        raise VersionDeleted(
            f"model {name!r}: version {version} was deleted; choose another", key=manifest_key(name, version)
        )
