"""The root of trust of a store: which keys may sign what. The Update Framework, root role (TUF specification 1.0, 5.3).

    trust/<n>.root.json     numbered, create-only; root n + 1 is signed by the keys of root n and by its own

Two roles are told apart: *publisher* (TUF ``targets``) vouches for versions and tags, *online* (TUF ``snapshot`` and
``timestamp``) says every day that they are still the newest. Devices are given any root once and follow the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Literal

from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from storage.errors import AlreadyExists, NotFound
from storage.signing.keys import SigningError
from storage.stores.blob_store import BlobStore

RoleName = Literal["root", "publisher", "online"]
ROLES: dict[RoleName, tuple[str, ...]] = {
    "root": (Root.type,),
    "publisher": (Targets.type,),
    "online": (Snapshot.type, Timestamp.type),
}
MAX_ROOT_BYTES = 512_000
ROOT_LIFE = timedelta(days=365)
_MAX_ROTATIONS = 256


def root_key(version: int) -> str:
    """Return the key of a root's document."""
    return f"trust/{version}.root.json"


def create_root(
    store: BlobStore,
    root_signers: Sequence[CryptoSigner],
    *,
    publishers: Sequence[Key],
    online: Sequence[Key],
    threshold: int = 1,
    life: timedelta = ROOT_LIFE,
) -> bytes:
    """Begin a chain of roots in ``store`` and return the first one, for devices to be given.

    ``threshold`` of the root keys must sign every later root. Raises ``SigningError`` where the store has one already.
    """
    root = Root(expires=_from_now(life), consistent_snapshot=True)
    holders: dict[RoleName, Sequence[Key]] = {
        "root": [signer.public_key for signer in root_signers],
        "publisher": publishers,
        "online": online,
    }
    for role, keys in holders.items():
        for key in keys:
            _add(root, key, role)
    root.roles[Root.type].threshold = threshold
    return _publish(store, Metadata(root), root_signers, trusted=None)


def newest_root(store: BlobStore) -> Metadata[Root]:
    """Return the last root of the chain, each link verified with the one before."""
    trusted: Metadata[Root] | None = None
    for version in range(1, _MAX_ROTATIONS + 2):
        try:
            raw = store.get(root_key(version), max_bytes=MAX_ROOT_BYTES)
        except NotFound:
            break
        trusted = check_link(raw, trusted)
    if trusted is None:
        raise SigningError(f"{store.uri} has no root of trust; make one with 'nestquant keys init'")
    return trusted


def check_link(raw: bytes, trusted: Metadata[Root] | None) -> Metadata[Root]:
    """Return a root that itself and, where there is one, the root before it vouch for."""
    try:
        root: Metadata[Root] = Metadata[Root].from_bytes(raw)
        for verifier in (trusted, root):
            if verifier is not None:
                verifier.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    except (RepositoryError, ValueError) as error:
        raise SigningError(f"root of trust: {error}") from error
    expected = trusted.signed.version + 1 if trusted else root.signed.version
    if root.signed.version != expected:
        raise SigningError(f"root of trust: version {root.signed.version}, expected {expected}")
    return root


def add_key(
    store: BlobStore, role: RoleName, key: Key, root_signers: Sequence[CryptoSigner], *, life: timedelta = ROOT_LIFE
) -> bytes:
    """Let ``key`` sign for ``role``; return the new root."""
    trusted = newest_root(store)
    root = _next(trusted, life)
    _add(root.signed, key, role)
    return _publish(store, root, root_signers, trusted)


def renew_root(store: BlobStore, root_signers: Sequence[CryptoSigner], *, life: timedelta = ROOT_LIFE) -> bytes:
    """Sign the same keys again for another ``life``, also where the newest root has ended; return the new root.

    Devices follow the chain, and only the last root of it must be alive (TUF specification 1.0, 5.3.10).
    """
    trusted = newest_root(store)
    return _publish(store, _next(trusted, life), root_signers, trusted)


def revoke_key(
    store: BlobStore,
    keyid: str,
    root_signers: Sequence[CryptoSigner],
    *,
    replacement: Key | None = None,
    life: timedelta = ROOT_LIFE,
) -> bytes:
    """Take ``keyid`` out of every role, or put ``replacement`` in its place (a rotation); return the new root.

    What the key signed no longer counts: sign every model again (``storage.signing.metadata.sign(..., afresh=True)``).
    """
    trusted = newest_root(store)
    root = _next(trusted, life)
    roles = [name for name, role in root.signed.roles.items() if keyid in role.keyids]
    keyids = ", ".join(sorted(full[:12] for full in root.signed.keys))
    if not roles:
        raise SigningError(f"key {keyid[:12]} signs for nothing; known are {keyids}")
    for name in roles:
        if replacement is not None:
            root.signed.add_key(replacement, name)
        root.signed.revoke_key(keyid, name)
        role = root.signed.roles[name]
        if len(role.keyids) < role.threshold:
            raise SigningError(f"without {keyid[:12]} too few keys sign for {name}; give a replacement")
    return _publish(store, root, root_signers, trusted)


def _add(root: Root, key: Key, role: RoleName) -> None:
    for name in ROLES[role]:
        root.add_key(key, name)


def _next(trusted: Metadata[Root], life: timedelta) -> Metadata[Root]:
    root = deepcopy(trusted.signed)
    root.version += 1
    root.expires = _from_now(life)
    return Metadata(root)


def _publish(
    store: BlobStore, root: Metadata[Root], signers: Sequence[CryptoSigner], trusted: Metadata[Root] | None
) -> bytes:
    for signer in signers:
        root.sign(signer, append=True)
    raw = root.to_bytes()
    check_link(raw, trusted)
    key = root_key(root.signed.version)
    try:
        store.put(key, raw, mode="create")
    except AlreadyExists as error:
        if store.get(key, max_bytes=MAX_ROOT_BYTES) != raw:
            raise SigningError(f"{key} is there already: somebody else changed the keys; look again") from error
    return raw


def _from_now(life: timedelta) -> datetime:
    return (datetime.now(UTC) + life).replace(microsecond=0)
