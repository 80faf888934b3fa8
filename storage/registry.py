"""Names and numbers on top of a store: publish a version, tag it, find it again.

Publishing needs one promise of the store, put-if-absent, and no LIST. Versions of a name are numbered 1, 2, 3, ...
without a gap: nobody writes number n + 1 before having seen number n, and a deleted version leaves a tombstone under
its number. So "is there a version n" is monotone in n, and the newest is found by doubling and bisecting, about ``2
log2 n`` HEAD requests, or two from a good hint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from storage import layout
from storage.condemned import read_condemned
from storage.digest import Data, digest_bytes, digest_pieces, verify_bytes
from storage.errors import BadKey, Corrupt, NotFound, UnsafeStore
from storage.manifest import (
    MAX_MANIFEST_BYTES,
    MEDIA_TYPE_SHARD,
    Descriptor,
    Manifest,
    ShardDescriptor,
    canonical_json,
    parse_manifest,
)
from storage.numbering import newest_number, take_number
from storage.references import (
    MAX_TAG_BYTES,
    TOMBSTONE_MAX_BYTES,
    TagEntry,
    TagRecord,
    check_not_deleted,
    check_tagged,
    parse_digest,
    parse_tag,
    parse_version,
    read_tombstone,
)
from storage.stores.blob_store import BlobStore
from storage.stores.capabilities import has_create_only
from storage.tags import TagLog, no_tag

if TYPE_CHECKING:
    from storage.shard import EncodedShard

_MAX_REPORT_BYTES = 64 << 20
_CHECK_THREADS = 8


@dataclass(frozen=True, slots=True)
class Published:
    """A version in the store.

    ``created`` is False where the newest version already held this content before anything was written.
    ``lost_races`` counts the numbers that somebody else took first, ``retries`` the writes of the manifest whose answer
    was lost or that the store refused with nobody's manifest there.
    """

    name: str
    version: int
    digest: str
    created: bool
    lost_races: int = 0
    retries: int = 0


@dataclass(slots=True)
class _Met:
    """What a commit met on its way."""

    lost_races: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Resolved:
    """A version as found.

    The manifest, its number and digest, and ``raw``, the very bytes that the digest (and a signature) is over.
    """

    manifest: Manifest
    version: int
    digest: str
    raw: bytes


class Registry:
    """The versions in one store. Holds no state but hints, so any number of registries and processes may share a store.

    A registry trusts for its lifetime what it saw about blobs marked for removal; make a new one for each job (shorter
    than gc's age of grace).
    """

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self._newest_seen: dict[str, int] = {}
        self._condemned: dict[str, float] | None = None

    # blobs

    def put_blob(self, data: Data, media_type: str) -> Descriptor:
        """Store bytes under their digest and describe them. What is there whole (`has_blob`) is not sent again."""
        descriptor = Descriptor(digest=digest_bytes(data), size_bytes=len(data), media_type=media_type)
        if not self.has_blob(descriptor):
            self.store.put(layout.blob_key(descriptor.digest), data, mode="overwrite")
        return descriptor

    def put_file(self, path: Path, *, digest: str, media_type: str) -> Descriptor:
        """Store a file whose digest (`storage.digest.digest_file`) is known, as `put_blob` does, block by block."""
        descriptor = Descriptor(digest=digest, size_bytes=path.stat().st_size, media_type=media_type)
        if not self.has_blob(descriptor):
            self.store.put_file(layout.blob_key(digest), path)
        return descriptor

    def put_shard(self, shard: EncodedShard) -> ShardDescriptor:
        """Store a shard as `put_blob` does."""
        blob = self.put_blob(shard.data, MEDIA_TYPE_SHARD)
        return ShardDescriptor(**blob.model_dump(), codec=shard.codec, decoded_bytes=shard.decoded_bytes)

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Tell whether the blob is there and may be relied upon: not condemned by gc, and read back whole.

        The bytes of a blob that is there are read once, piece by piece: one that rotted, or whose upload broke, counts
        as missing, so that whoever asks sends it again.
        """
        key = layout.blob_key(descriptor.digest)
        try:
            info = self.store.head(key)
        except NotFound:
            return False
        if info.size_bytes != descriptor.size_bytes or self._is_condemned(key, info.modified_s):
            return False
        try:
            return digest_pieces(self.store.stream(key)) == (descriptor.digest, descriptor.size_bytes)
        except NotFound:  # removed since
            return False

    def get_blob(self, descriptor: Descriptor) -> bytes:
        """Return a blob's bytes, verified. Raises `NotFound`, `Corrupt`."""
        key = layout.blob_key(descriptor.digest)
        data = self.store.get(key, max_bytes=descriptor.size_bytes)
        verify_bytes(key, data, digest=descriptor.digest, size_bytes=descriptor.size_bytes)
        return data

    def _is_condemned(self, key: str, modified_s: float) -> bool:
        if self._condemned is None:
            self._condemned = read_condemned(self.store)
        return modified_s <= self._condemned.get(key, -math.inf)

    # versions

    def publish(self, draft: Manifest, *, single_writer: bool = False) -> Published:
        """Publish ``draft`` under the next number, or find that the newest version is the same already.

        The draft's own ``version`` is ignored.
        Blobs are checked first: every one named must be there with its size. Then the manifest is put if absent; a
        refusal or a lost answer is resolved by reading back. Raises `NotFound` or `Corrupt` for a blob, `UnsafeStore`
        where the store has no put-if-absent and ``single_writer`` was not said; said on such a store, it is recorded in
        the manifest.
        """
        safe = has_create_only(self.store)
        if not safe and not single_writer:
            raise UnsafeStore(
                f"{self.store.uri}: this store ignores put-if-absent, so two publishers could overwrite each other; "
                "use another store, or say --single-writer if nobody else publishes to it"
            )
        draft = draft.model_copy(update={"single_writer": not safe})
        self.check_blobs(draft.named_blobs())
        newest = self.newest_version(draft.name)
        if newest and (same := self._same_content(draft, newest)):
            return same
        met = _Met()
        while True:
            published = self._commit(draft, newest + 1, met, create_only=safe)
            newest += 1
            self._newest_seen[draft.name] = newest
            if published is not None:
                return replace(published, lost_races=met.lost_races, retries=met.retries)

    def check_blobs(self, descriptors: Iterable[Descriptor]) -> None:
        """Raise `NotFound` or `Corrupt` unless every blob is there with its size.

        The bytes are checked where a blob is taken over from an earlier run (`has_blob`) and when the version is pulled
        back, before it is tagged.
        """

        def check(descriptor: Descriptor) -> None:
            key = layout.blob_key(descriptor.digest)
            actual_bytes = self.store.head(key).size_bytes
            if actual_bytes != descriptor.size_bytes:
                raise Corrupt(key, expected=f"{descriptor.size_bytes} bytes", seen=f"{actual_bytes} bytes")

        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            for _ in pool.map(check, descriptors):
                pass

    def _commit(self, draft: Manifest, version: int, met: _Met, *, create_only: bool) -> Published | None:
        """Write one number; return None where it is somebody else's."""
        manifest = draft.model_copy(update={"version": version})
        raw, key = canonical_json(manifest), layout.manifest_key(draft.name, version)
        claim = take_number(self.store, key, raw, max_bytes=MAX_MANIFEST_BYTES, create_only=create_only)
        met.retries += claim.retries
        met.lost_races += not claim.ours
        return Published(draft.name, version, digest_bytes(raw), created=True) if claim.ours else None

    def newest_version(self, name: str) -> int:
        """Return the highest number given out so far, deleted versions included; 0 where there is none.

        Needs no LIST.
        """

        def there(version: int) -> bool:
            return version <= layout.MAX_VERSION and self.store.exists(layout.manifest_key(name, version))

        newest = newest_number(there, self._newest_seen.get(name) or self._hint(name))
        self._newest_seen[name] = newest
        return newest

    def _hint(self, name: str) -> int:
        """Return a version that is likely to be there: what the tag ``latest`` says to older releases."""
        try:
            raw = self.store.get(layout.tag_key(name, "latest"), max_bytes=MAX_TAG_BYTES)
        except NotFound:
            return 0
        return parse_tag(raw, name, "latest").version

    def _same_content(self, draft: Manifest, version: int) -> Published | None:
        raw = self._raw(draft.name, version)
        if canonical_json(draft.model_copy(update={"version": version})) != raw:
            return None
        return Published(draft.name, version, digest_bytes(raw), created=False)

    def resolve(self, name: str, ref: str | int = "latest") -> Resolved:
        """Return the version that a tag, a number or a manifest's digest names.

        Raises `NotFound`, `VersionDeleted`, `InvalidManifest`, `Corrupt`.
        """
        layout.model_prefix(name)
        text = str(ref)
        if (digest := parse_digest(text)) is not None:
            return self._resolve_digest(name, digest)
        if (version := parse_version(text)) is not None:
            return self._read_version(name, version)
        tag = self.read_tag(name, text)
        resolved = self._read_version(name, tag.version)
        check_tagged(tag, text, resolved.digest)
        return resolved

    def _resolve_digest(self, name: str, digest: str) -> Resolved:
        for version in range(self.newest_version(name), 0, -1):
            if digest_bytes(self._raw(name, version)) == digest:
                return self._read_version(name, version)
        raise NotFound(f"model {name!r}: no version has the digest {digest}; 'nestquant ls' shows what there is")

    def _raw(self, name: str, version: int) -> bytes:
        return self.store.get(layout.manifest_key(name, version), max_bytes=MAX_MANIFEST_BYTES)

    def _read_version(self, name: str, version: int) -> Resolved:
        try:
            raw = self._raw(name, version)
        except NotFound:
            raise NotFound(
                f"model {name!r}: no version {version} in {self.store.uri}; 'nestquant ls' shows what there is"
            ) from None
        check_not_deleted(raw, name, version)
        return Resolved(parse_manifest(raw, name=name, version=version), version, digest_bytes(raw), raw)

    def versions(self, name: str) -> list[int]:
        """Return the numbers of all versions that were not deleted, ascending, as LIST tells."""
        numbers = []
        for info in self.store.list(layout.versions_prefix(name)):
            version = layout.manifest_version(info.key)
            if version is None:
                continue
            if info.size_bytes > TOMBSTONE_MAX_BYTES or read_tombstone(self._raw(name, version)) is None:
                numbers.append(version)
        return numbers

    def models(self) -> list[str]:
        """Return the names that have anything published, sorted, as LIST tells."""
        return list(self.store.folders("models/"))

    # tags and reports

    def tag(self, name: str, tag: str, version: int, *, back: bool = False) -> TagEntry:
        """Point ``tag`` at a version that is there, and return the numbered entry that says so.

        Raises `WouldGoBack` where it names a later one and ``back`` was not said.
        """
        return self.tag_log(name, tag).move(self._record(name, version), back=back)

    def tag_forward(self, name: str, tag: str, version: int) -> TagEntry | None:
        """Point ``tag`` at a version that is later than all that it ever named, and return the entry that says so.

        None where it is not: two jobs may end in another order than they began, and a person's move back stands. Of
        any number that tag at the same instant, the latest version is what the tag names in the end.
        """
        return self.tag_log(name, tag).advance(self._record(name, version))

    def tag_log(self, name: str, tag: str) -> TagLog:
        """Return the entries of a tag: its history, and its undo."""
        return TagLog(self.store, name, tag, self._holds)

    def _record(self, name: str, version: int) -> TagRecord:
        return TagRecord(name=name, version=version, digest=self._read_version(name, version).digest)

    def _holds(self, record: TagRecord) -> bool:
        try:
            return digest_bytes(self._raw(record.name, record.version)) == record.digest
        except (NotFound, BadKey):
            return False

    def read_tag(self, name: str, tag: str) -> TagRecord:
        """Return what a tag says: its newest entry, or the plain object where an older release wrote a later version.

        Raises `NotFound`, `InvalidManifest`.
        """
        record = self.tag_log(name, tag).state().says()
        if record is None:
            raise no_tag(self.store, name, tag)
        return record

    def tag_names(self, name: str) -> list[str]:
        """Return the names of a model's tags, sorted, as LIST tells."""
        plain = (info.key.rpartition("/")[2] for info in self.store.list(layout.tags_prefix(name)))
        entries = self.store.folders(layout.entries_prefix(name))
        return sorted({key.removesuffix(".json") for key in plain} | set(entries))

    def tags(self, name: str) -> dict[str, int]:
        """Return tag -> version, as LIST tells."""
        return {tag: self.read_tag(name, tag).version for tag in self.tag_names(name)}

    def put_report(self, name: str, version: int, report: str, data: Data) -> None:
        """Keep measurements beside a version: JSON, never part of it, the last one wins."""
        self.store.put(layout.report_key(name, version, report), data, mode="overwrite")

    def get_report(self, name: str, version: int, report: str) -> bytes:
        """Return a report's bytes. Raises `NotFound`."""
        return self.store.get(layout.report_key(name, version, report), max_bytes=_MAX_REPORT_BYTES)
