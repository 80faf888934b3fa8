"""What a publisher signs: which versions and tags of a model count, and until when (TUF, one repository per model).

    models/<name>/trust/<n>.targets.json    versions and tags, each with length and SHA-256 of its manifest; create-only
    models/<name>/trust/<n>.snapshot.json   names <n>.targets.json; create-only
    models/<name>/trust/timestamp.json      names the newest snapshot; the one file that is overwritten

Edition n is the pair of that number, so that putting ``<n>.targets.json`` if absent orders all signers, and nothing but
that is asked of the store. Every document names its model: those of one model cannot be served for another, although
all share the keys of the store's root.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from storage.errors import NotFound
from storage.layout import check_tag, manifest_key, model_prefix
from storage.numbering import newest_number, take_number
from storage.references import TagEntry
from storage.registry import Registry
from storage.signing.expiry import check_clock, expiries, now, warnings_of
from storage.signing.keys import SigningError
from storage.signing.rollouts import rollout_target
from storage.signing.root import newest_root
from storage.stores.blob_store import BlobStore

MODEL_FIELD = "x-nestquant-model"
SIGNED_AT_FIELD = "x-nestquant-signed-at-s"
"""In a timestamp: when it was signed, in seconds since 1970. Its version only ever grows, also after a wrong clock."""

MAX_TARGETS_BYTES = 5_000_000
MAX_SNAPSHOT_BYTES = 65_536
MAX_TIMESTAMP_BYTES = 16_384
_ATTEMPTS = 50
Backwards = Literal["refuse", "allow", "skip"]
T = TypeVar("T", Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class Lives:
    """How long each statement holds: ``timestamp`` bounds how long a device can be kept from news."""

    targets: timedelta = timedelta(days=365)
    snapshot: timedelta = timedelta(days=365)
    timestamp: timedelta = timedelta(days=7)


@dataclass(frozen=True)
class Signed:
    """An edition in the store: its number, the versions and tags it vouches for, and when its timestamp ends.

    ``warnings``: which other role ends soon, and what renews it.
    """

    name: str
    edition: int
    versions: tuple[int, ...]
    tags: dict[str, int]
    expires: datetime
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Keys:
    root: Root
    signers: Sequence[CryptoSigner]

    def sign(self, role: str, metadata: Metadata[T]) -> bytes:
        allowed = self.root.roles[role]
        for signer in self.signers:
            if signer.public_key.keyid in allowed.keyids:
                metadata.sign(signer, append=True)
        if len(metadata.signatures) < allowed.threshold:
            keyids = ", ".join(keyid[:12] for keyid in allowed.keyids)
            raise SigningError(f"no key given that may sign {role}; the root names {keyids}")
        return metadata.to_bytes()

    def check(self, role: str, raw: bytes, name: str) -> Metadata[T]:
        """Parse what the store holds and verify it; the caller knows the type from the role."""
        return check_signed(self.root, role, raw, name)


def check_signed(root: Root, role: str, raw: bytes, name: str) -> Metadata[T]:
    """Return a role's document of a model, of the type that its role has. Raises ``SigningError`` unless a root's keys
    have signed it for this model.
    """
    try:
        metadata: Metadata[T] = Metadata.from_bytes(raw)
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError as error:
        raise SigningError(
            f"{name}: the newest {role} is not signed by a key that the root still names; "
            "sign afresh, saying which versions and tags count"
        ) from error
    except (RepositoryError, ValueError) as error:
        raise SigningError(f"{name}: {role}: {error}") from error
    if metadata.signed.type != role:  # one key may sign several roles
        raise SigningError(f"{name}: a {metadata.signed.type} stands where the {role} should; sign the model again")
    if metadata.signed.unrecognized_fields.get(MODEL_FIELD) != name:
        raise SigningError(f"{name}: the {role} there is of another model")
    return metadata


def trust_key(name: str, document: str) -> str:
    """Return the key of one of a model's signed documents."""
    return f"{model_prefix(name)}trust/{document}.json"


def tag_target(name: str, tag: str) -> str:
    """Return the path under which a tag stands among the targets."""
    return f"{model_prefix(name)}tags/{check_tag(tag)}"


def sign(
    store: BlobStore,
    name: str,
    signers: Sequence[CryptoSigner],
    *,
    versions: Iterable[int] = (),
    tags: Mapping[str, int] | None = None,
    moves: Iterable[TagEntry] = (),
    withdraw: Iterable[int] = (),
    afresh: bool = False,
    backwards: Backwards = "refuse",
    lives: Lives | None = None,
) -> Signed:
    """Vouch for versions that the store holds, and for tags; what was vouched for before stays, unless ``afresh``.

    Needs a publisher and an online key. A tag's version is vouched for with it. ``withdraw`` takes versions back.
    ``backwards``: what to do with a tag that is signed for a later version already, since devices would follow it back.
    ``moves``: tags as their numbered entries say; each is signed with its entry's number, and one of which a later
    entry is signed already stays, so that signers who race leave what the last entry says.

    Raises:
        SigningError: a key is missing, a tag would move back, the root has ended, or a clock is wrong.
        storage.StorageError: a version is not there, or the store refuses.
    """
    targets, entries = dict(tags or {}), tuple(moves)
    named = set(versions)
    withdrawn = {manifest_key(name, version) for version in withdraw}

    def change(before: dict[str, TargetFile]) -> dict[str, TargetFile]:
        forward = _forward(name, targets, before, backwards)
        due = [entry for entry in entries if _is_due(name, entry, before, backwards)]
        said = {**forward, **{entry.tag: entry.version for entry in due}}
        added = _targets_of(store, name, named | set(said.values()), said)
        for entry in due:
            added[tag_target(name, entry.tag)].unrecognized_fields["custom"]["entry"] = entry.number
        over = {path for tag, version in said.items() for path in _caught_up(name, tag, version, before)}
        files = {path: file for path, file in before.items() if not _withdrawn(path, file, name, withdrawn | over)}
        return {**files, **added}

    return amend(store, name, signers, change, afresh=afresh, lives=lives)


def amend(
    store: BlobStore,
    name: str,
    signers: Sequence[CryptoSigner],
    change: Callable[[dict[str, TargetFile]], dict[str, TargetFile]],
    *,
    afresh: bool = False,
    lives: Lives | None = None,
) -> Signed:
    """Make the next edition of what ``change`` makes of the targets of the newest one (of none, with ``afresh``).

    Others may sign at the same time: then ``change`` is asked again, about theirs. Raises as ``sign`` does.
    """
    lives = lives or Lives()
    check_clock(store)
    keys = _Keys(_living_root(store), signers)
    edition = newest_edition(store, name)
    for _ in range(_ATTEMPTS):
        before = {} if afresh or not edition else _read_targets(store, name, edition, keys).targets
        targets = Targets(edition + 1, expires=_from_now(lives.targets), targets=change(dict(before)))
        targets.unrecognized_fields[MODEL_FIELD] = name
        raw = keys.sign(Targets.type, Metadata(targets))
        edition += 1
        if _create(store, trust_key(name, f"{edition}.targets"), raw):
            return _announce(store, name, edition, keys, lives)
    raise SigningError(f"{name}: {_ATTEMPTS} others signed at the same time; try again")


def refresh(store: BlobStore, name: str, signers: Sequence[CryptoSigner], *, lives: Lives | None = None) -> Signed:
    """Say again that the newest edition is the newest, well within ``Lives.timestamp``; needs the online key alone.

    With a publisher's key among ``signers``, what else has ended or ends within 30 days is renewed by a new edition.

    Raises:
        SigningError: nothing was signed, a key is missing, or a role that has ended cannot be renewed with these keys.
    """
    check_clock(store)
    root = _living_root(store)
    edition = newest_edition(store, name)
    if not edition:
        raise SigningError(f"{name}: nothing was signed yet; sign a version first")
    ends = {role: end for role, end in expiries(store, name).items() if role in (Targets.type, Snapshot.type)}
    publishers = root.roles[Targets.type].keyids
    if warnings_of(ends) and any(signer.public_key.keyid in publishers for signer in signers):
        return sign(store, name, signers, lives=lives)
    ended = [role for role, end in ends.items() if end <= now()]
    if ended:
        raise SigningError(
            f"{name}: the signed {ended[0]} ended on {ends[ended[0]]:%Y-%m-%d}, so devices refuse it; a new edition "
            "renews it: give the publisher's key beside the online key"
        )
    return _announce(store, name, edition, _Keys(root, signers), lives or Lives())


def _living_root(store: BlobStore) -> Root:
    root = newest_root(store).signed
    if root.expires <= now():
        raise SigningError(
            f"the root of trust of {store.uri} ended on {root.expires:%Y-%m-%d}, so devices refuse all that it names; "
            "renew it with 'nestquant keys renew', then sign"
        )
    return root


def _forward(
    name: str, tags: Mapping[str, int], before: Mapping[str, TargetFile], backwards: Backwards
) -> dict[str, int]:
    """Return the tags that may move; a tag that is signed for a later version moves back on a person's word alone."""
    if backwards == "allow":
        return dict(tags)
    forward = {}
    for tag, version in tags.items():
        signed = before.get(tag_target(name, tag))
        newer = 0 if signed is None else int(signed.custom["version"])
        if newer <= version:
            forward[tag] = version
        elif backwards == "refuse":
            raise SigningError(
                f"{name}: tag {tag!r} is signed for version {newer}; at version {version} devices would go back: "
                "say --backwards if that is meant"
            )
    return forward


def _is_due(name: str, entry: TagEntry, before: Mapping[str, TargetFile], backwards: Backwards) -> bool:
    """Tell whether a tag's move is later than what is signed of it; entries decide wherever both have one."""
    signed = before.get(tag_target(name, entry.tag))
    number = None if signed is None else signed.custom.get("entry")
    if number is not None:
        return bool(number < entry.number)
    allowed = backwards if entry.move in ("forward", "adopted") else "allow"
    return bool(_forward(name, {entry.tag: entry.version}, before, allowed))


def _caught_up(name: str, tag: str, version: int, before: Mapping[str, TargetFile]) -> list[str]:
    """Return the rollouts that a tag's move ends, for it names their version or a later one."""
    whole = rollout_target(name, tag)
    rollouts = [path for path in before if path == whole or path.startswith(f"{whole}/")]
    return [path for path in rollouts if before[path].custom["version"] <= version]


def _targets_of(store: BlobStore, name: str, versions: set[int], tags: Mapping[str, int]) -> dict[str, TargetFile]:
    registry, targets = Registry(store), {}
    for version in sorted(versions):
        raw = registry.resolve(name, version).raw
        tagged = [tag_target(name, tag) for tag, tagged_version in tags.items() if tagged_version == version]
        for path in [manifest_key(name, version), *tagged]:
            targets[path] = TargetFile.from_data(path, raw, ["sha256"])
            targets[path].unrecognized_fields["custom"] = {"version": version}
    return targets


def _withdrawn(path: str, file: TargetFile, name: str, gone: set[str]) -> bool:
    return path in gone or manifest_key(name, file.custom["version"]) in gone


def newest_edition(store: BlobStore, name: str) -> int:
    """Return the highest edition, 0 where nothing was signed.

    Editions are numbered without a gap, so doubling and bisecting finds it without LIST.
    """
    return newest_number(lambda edition: store.exists(trust_key(name, f"{edition}.targets")))


def _read_targets(store: BlobStore, name: str, edition: int, keys: _Keys) -> Targets:
    raw = store.get(trust_key(name, f"{edition}.targets"), max_bytes=MAX_TARGETS_BYTES)
    metadata: Metadata[Targets] = keys.check(Targets.type, raw, name)
    return metadata.signed


def _announce(store: BlobStore, name: str, edition: int, keys: _Keys, lives: Lives) -> Signed:
    """Complete an edition and point the timestamp at it, or at a later one that came in between."""
    while True:
        raw_targets = store.get(trust_key(name, f"{edition}.targets"), max_bytes=MAX_TARGETS_BYTES)
        targets: Metadata[Targets] = keys.check(Targets.type, raw_targets, name)
        meta = {"targets.json": MetaFile.from_data(edition, raw_targets, ["sha256"])}
        snapshot = Snapshot(edition, expires=_from_now(lives.snapshot), meta=meta)
        snapshot.unrecognized_fields[MODEL_FIELD] = name
        snapshot_key = trust_key(name, f"{edition}.snapshot")
        _create(store, snapshot_key, keys.sign(Snapshot.type, Metadata(snapshot)))
        raw_snapshot = store.get(snapshot_key, max_bytes=MAX_SNAPSHOT_BYTES)
        _: Metadata[Snapshot] = keys.check(
            Snapshot.type, raw_snapshot, name
        )  # whoever came first: is it still trusted?
        timestamp = Timestamp(
            _next_timestamp(store, name, keys),
            expires=_from_now(lives.timestamp),
            snapshot_meta=MetaFile.from_data(edition, raw_snapshot, ["sha256"]),
        )
        timestamp.unrecognized_fields |= {MODEL_FIELD: name, SIGNED_AT_FIELD: int(time.time())}
        raw = keys.sign(Timestamp.type, Metadata(timestamp))
        store.put(trust_key(name, "timestamp"), raw, mode="overwrite")
        if not store.exists(trust_key(name, f"{edition + 1}.targets")):
            return _summary(store, name, edition, targets.signed, timestamp.expires)
        edition += 1  # our timestamp may have overtaken that of a faster signer: name the newest again


def lasting_timestamp(store: BlobStore, name: str, signers: Sequence[CryptoSigner], life: timedelta) -> bytes:
    """Return a timestamp that holds for ``life``, for a bundle that travels; the store gets a fresh one of its own.

    Its version is one below the store's, so that a device which took the bundle takes the store's word again later.
    Needs the online key. Raises ``SigningError``.
    """
    refresh(store, name, signers)
    keys = _Keys(_living_root(store), signers)
    raw = store.get(trust_key(name, "timestamp"), max_bytes=MAX_TIMESTAMP_BYTES)
    fresh: Metadata[Timestamp] = keys.check(Timestamp.type, raw, name)
    fresh.signed.version -= 1
    fresh.signed.expires = _from_now(life)
    fresh.signatures.clear()
    return keys.sign(Timestamp.type, fresh)


def _next_timestamp(store: BlobStore, name: str, keys: _Keys) -> int:
    """Return a version above the last: milliseconds since 1970, or one more than a clock that was ahead has left."""
    milliseconds = int(time.time() * 1000)
    try:
        raw = store.get(trust_key(name, "timestamp"), max_bytes=MAX_TIMESTAMP_BYTES)
        last: Metadata[Timestamp] = keys.check(Timestamp.type, raw, name)
    except (NotFound, SigningError):
        return milliseconds  # none yet, or of a revoked key: devices forget that one too (TUF specification, 5.3.11)
    return max(milliseconds, last.signed.version + 1)


def _create(store: BlobStore, key: str, raw: bytes) -> bool:
    """Put if absent; True where the bytes under ``key`` are ours, even if the answer to our write was lost."""
    return take_number(store, key, raw, max_bytes=MAX_TARGETS_BYTES).ours


def _summary(store: BlobStore, name: str, edition: int, targets: Targets, expires: datetime) -> Signed:
    prefix = f"{model_prefix(name)}tags/"
    files = {path: file.custom["version"] for path, file in targets.targets.items()}
    tags = {path.removeprefix(prefix): version for path, version in files.items() if path.startswith(prefix)}
    versions = tuple(sorted({version for path, version in files.items() if not path.startswith(prefix)}))
    return Signed(name, edition, versions, tags, expires, warnings_of(expiries(store, name)))


def _from_now(life: timedelta) -> datetime:
    return now() + life
