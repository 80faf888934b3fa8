"""What is signed of a model, read and verified for people: which versions and tags, by which keys, and until when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from securesystemslib.signer import Signature
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from storage.digest import digest_hex
from storage.errors import NotFound, TooLarge
from storage.layout import manifest_key
from storage.signing.keys import SigningError
from storage.signing.metadata import (
    MAX_SNAPSHOT_BYTES,
    MAX_TARGETS_BYTES,
    MAX_TIMESTAMP_BYTES,
    check_signed,
    tag_target,
    trust_key,
)
from storage.signing.rollouts import Rollout, rollouts_of
from storage.stores.blob_store import BlobStore


@dataclass(frozen=True, slots=True)
class Statement:
    """One edition, verified from the root down to its targets as a device does, but for expiry, which ``ends`` tells.

    ``signers[role]``: ids of the keys that signed it and that the root names for it. ``ends[role]``: when it ends.
    """

    name: str
    edition: int
    signers: Mapping[str, tuple[str, ...]]
    ends: Mapping[str, datetime]
    targets: Mapping[str, TargetFile]

    def vouches_for(self, version: int, digest: str, size_bytes: int) -> bool:
        """Tell whether exactly these bytes of a manifest are signed under this number."""
        return self._is(manifest_key(self.name, version), digest, size_bytes)

    def vouches_for_tag(self, tag: str, digest: str, size_bytes: int) -> bool:
        """Tell whether a tag is signed to name exactly this manifest."""
        return self._is(tag_target(self.name, tag), digest, size_bytes)

    def rollouts(self, tag: str) -> tuple[Rollout, ...]:
        """Return the staged rollouts of a tag. Raises ``ValueError`` for one that is signed but makes no sense."""
        return tuple(rollouts_of(self.targets, self.name, tag))

    def _is(self, path: str, digest: str, size_bytes: int) -> bool:
        file = self.targets.get(path)
        return file is not None and (file.length, file.hashes.get("sha256")) == (size_bytes, digest_hex(digest))


def read_statement(store: BlobStore, name: str, root: Root) -> Statement | None:
    """Return what the timestamp in the store names; None where nothing was signed of the model.

    Raises:
        SigningError: a document is missing, not signed by a key of the root, or not the one that another names.
        storage.StorageError: the store refuses.
    """
    try:
        raw = store.get(trust_key(name, "timestamp"), max_bytes=MAX_TIMESTAMP_BYTES)
    except NotFound:
        return None
    timestamp: Metadata[Timestamp] = check_signed(root, Timestamp.type, raw, name)
    edition = timestamp.signed.snapshot_meta.version
    snapshot: Metadata[Snapshot] = check_signed(
        root,
        Snapshot.type,
        _named(store, name, f"{edition}.snapshot", timestamp.signed.snapshot_meta, MAX_SNAPSHOT_BYTES),
        name,
    )
    meta = snapshot.signed.meta.get("targets.json")
    if meta is None:
        raise SigningError(f"{name}: the snapshot of edition {edition} names no targets; sign the model again")
    targets: Metadata[Targets] = check_signed(
        root, Targets.type, _named(store, name, f"{edition}.targets", meta, MAX_TARGETS_BYTES), name
    )
    verified: list[tuple[str, bytes, dict[str, Signature], datetime]] = [
        (Targets.type, targets.signed_bytes, targets.signatures, targets.signed.expires),
        (Snapshot.type, snapshot.signed_bytes, snapshot.signatures, snapshot.signed.expires),
        (Timestamp.type, timestamp.signed_bytes, timestamp.signatures, timestamp.signed.expires),
    ]
    return Statement(
        name=name,
        edition=edition,
        signers={
            role: tuple(sorted(root.get_verification_result(role, payload, signatures).signed))
            for role, payload, signatures, _ in verified
        },
        ends={Root.type: root.expires, **{role: end for role, _, _, end in verified}},
        targets=targets.signed.targets,
    )


def _named(store: BlobStore, name: str, document: str, meta: MetaFile, max_bytes: int) -> bytes:
    """Return a document that is the one that another document names."""
    try:
        raw = store.get(trust_key(name, document), max_bytes=max_bytes)
        meta.verify_length_and_hashes(raw)
    except (NotFound, TooLarge, RepositoryError) as error:
        raise SigningError(f"{name}: {document}.json is not what was signed: {error}") from error
    return raw
