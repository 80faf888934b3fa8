"""The rules of tags, numbers and digests: what a reference means, and which bytes under a tag or number count.

Without I/O, so that the two who read them, a publisher's registry and a device, go by the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from storage.digest import digest_hex
from storage.document import parse_record
from storage.errors import Corrupt, InvalidManifest, TooLarge, VersionDeleted
from storage.layout import entry_key, manifest_key, newest_entry_key, tag_key
from storage.manifest import Digest, ModelName, Record
from storage.numbering import newest_number

TOMBSTONE_MAX_BYTES = 512
MAX_TAG_BYTES = 4096


class TagRecord(Record):
    """What a tag says: a version of a name and the digest of its manifest."""

    name: ModelName
    version: int
    digest: Digest


class TagEntry(Record):
    """One move of a tag: create-only, numbered from 1, never rewritten. The newest one is what the tag says.

    ``highest``: the latest version that this tag has ever named. ``before``: the entry that an undo goes back to, None
    where there is none. ``move``: ``forward``, ``back`` (a person's word), ``undo``, or ``adopted`` where an older
    release had moved the tag without an entry.
    """

    name: ModelName
    tag: str
    number: int = Field(ge=1)
    version: int = Field(ge=1)
    digest: Digest
    highest: int = Field(ge=1)
    before: int | None = Field(default=None, ge=1)
    move: Literal["forward", "back", "undo", "adopted"]

    def record(self) -> TagRecord:
        """Return what the tag says after this move, as releases without entries read it."""
        return TagRecord(name=self.name, version=self.version, digest=self.digest)


@dataclass(frozen=True, slots=True)
class TagState:
    """What stands in a store of one tag: the copy that older releases read and write, and the newest entry.

    ``damage``: why the copy cannot be read, None where it can or is not there.
    """

    copy: TagRecord | None
    entry: TagEntry | None
    damage: InvalidManifest | TooLarge | None = None

    def moved_by_older(self) -> TagRecord | None:
        """Return the copy where only a release without entries can have written it.

        An entry is always written before its copy, so a copy that is ahead of everything that entries ever named is no
        straggler: it is a move that has no entry. One at or below that is a straggler of a race, and does not count.
        """
        if self.copy is not None and (self.entry is None or self.copy.version > self.entry.highest):
            return self.copy
        return None

    def says(self) -> TagRecord | None:
        """Return what the tag says; None where there is no such tag. Raises the damage where there is nothing else."""
        if self.entry is None and self.damage is not None:
            raise self.damage
        return self.moved_by_older() or (None if self.entry is None else self.entry.record())


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


def parse_entry(raw: bytes, name: str, tag: str, number: int) -> TagEntry:
    """Return the entry that the bytes under a tag's number are. Raises `InvalidManifest`."""
    key = entry_key(name, tag, number)
    try:
        entry = parse_record(raw, TagEntry)
    except ValueError as error:
        raise InvalidManifest(f"{key}: no entry of a tag: {str(error).splitlines()[0]}", key=key) from error
    if (entry.name, entry.tag, entry.number) != (name, tag, number):
        subject = f"entry {entry.number} of {entry.name}'s tag {entry.tag!r}"
        raise InvalidManifest(f"{key}: is {subject}; it was stored under another number", key=key)
    return entry


def read_tag_state(fetch: Callable[[str, int], bytes | None], name: str, tag: str) -> TagState:
    """Return what stands of a tag. ``read(key, max_bytes)`` returns an object's bytes, None where there is none.

    The copy is read first: whatever it says, the entry behind it is there by then. Four small reads, two more for a
    tag without entries than for its copy alone; a hint that lies costs reads.
    """
    copy, damage = None, None
    try:
        raw = fetch(tag_key(name, tag), MAX_TAG_BYTES)
        copy = None if raw is None else parse_tag(raw, name, tag)
    except (InvalidManifest, TooLarge) as error:
        damage = error
    entries: dict[int, TagEntry] = {}

    def there(number: int) -> bool:
        raw = fetch(entry_key(name, tag, number), MAX_TAG_BYTES)
        if raw is not None:
            entries[number] = parse_entry(raw, name, tag, number)
        return raw is not None

    hint = fetch(newest_entry_key(name, tag), MAX_TAG_BYTES)
    newest = newest_number(there, 0 if hint is None else _hinted(hint))
    return TagState(copy, entries.get(newest), damage)


def _hinted(raw: bytes) -> int:
    try:
        return parse_record(raw, TagEntry).number
    except ValueError:
        return 0


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
