"""What may go, what must stay, and whether what stayed is still whole: ``gc``, ``delete_version``, ``fsck``.

A blob goes in two steps. One run *condemns* it: no version names it, and it is written into ``gc/condemned.json``. A
later run, at least an age of grace after, removes it if still no version names it and nobody has written it anew. A
publisher that meets a condemned blob sends it again, which saves it. So a publisher is safe as long as one job takes
less than the age of grace. All times are the store's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from storage import layout
from storage.condemned import read_condemned, write_condemned
from storage.digest import digest_pieces
from storage.errors import Corrupt, NotFound, StorageError, VersionDeleted
from storage.manifest import Descriptor, canonical_json
from storage.references import TagState, Tombstone
from storage.registry import Registry, Resolved
from storage.stores.blob_store import BlobStore
from storage.stores.capabilities import PROBE_PREFIX, is_probe_key
from storage.stores.clock import store_time_s

GRACE_S = 7 * 24 * 3600.0
_FSCK_THREADS = 4


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a run of `gc` found.

    With ``dry_run`` nothing was written or removed, and ``removed`` is what a real run would remove now.
    """

    dry_run: bool
    versions: int
    kept_blobs: int
    condemned: tuple[str, ...]
    removed: tuple[str, ...]
    removed_bytes: int


@dataclass(frozen=True, slots=True)
class DeletedVersion:
    """A version that is gone, the digest its manifest had, and the tags that still point at it."""

    name: str
    version: int
    digest: str
    dangling_tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FsckReport:
    """What `fsck` re-read, and each problem in one line."""

    models: int
    versions: int
    blobs: int
    bytes_read: int
    problems: tuple[str, ...]


def gc(store: BlobStore, *, grace_s: float = GRACE_S, dry_run: bool = True) -> GcReport:
    """Remove blobs that no version names and that an earlier run condemned at least ``grace_s`` ago.

    Condemn the others.

    ``grace_s=0`` does both at once: only for a store that nobody publishes to meanwhile. Every manifest is read; one
    that cannot be trusted stops the run.
    """
    named, versions = _named_blobs(store)
    now_s = time.time() if dry_run else store_time_s(store)
    earlier = read_condemned(store)
    condemned: dict[str, float] = {}
    due: dict[str, int] = {}
    for info in store.list("blobs/sha256/"):
        if info.key in named or not layout.is_blob_key(info.key):
            continue
        since_s = earlier.get(info.key, now_s)
        condemned[info.key] = now_s if info.modified_s >= since_s else since_s  # sent again since: somebody wants it
        if now_s - condemned[info.key] >= grace_s:
            due[info.key] = info.size_bytes
    if not dry_run:
        write_condemned(store, condemned)
        due = {key: size for key, size in due.items() if _remove(store, key, condemned[key])}
        write_condemned(store, {key: since_s for key, since_s in condemned.items() if key not in due})
        _sweep_probes(store, older_than_s=now_s - GRACE_S)
    waiting = tuple(key for key in condemned if key not in due)
    return GcReport(dry_run, versions, len(named), waiting, tuple(due), sum(due.values()))


def _remove(store: BlobStore, key: str, since_s: float) -> bool:
    """Remove a condemned blob unless somebody has sent it again since."""
    try:
        if store.head(key).modified_s >= since_s:  # S3 tells whole seconds, so a tie may be later
            return False
    except NotFound:
        return False
    store.delete(key)
    return True


def _sweep_probes(store: BlobStore, *, older_than_s: float) -> None:
    """Remove what a killed probe left behind, by the exact names that probes use: `doctor/` may be anyone's."""
    for leftover in store.list(PROBE_PREFIX):
        if is_probe_key(leftover.key) and leftover.modified_s < older_than_s:
            store.delete(leftover.key)


def _named_blobs(store: BlobStore) -> tuple[set[str], int]:
    """Return the keys of all blobs that a version names, and the number of versions.

    Numbers are counted by HEAD, not by LIST, so that a listing that lags hides no version of a name that it shows.
    """
    registry = Registry(store)
    named: set[str] = set()
    versions = 0
    for name in registry.models():
        for resolved in _resolved(registry, name):
            versions += 1
            named.update(layout.blob_key(blob.digest) for blob in resolved.manifest.named_blobs())
    return named, versions


def _resolved(registry: Registry, name: str) -> Iterator[Resolved]:
    for version in range(1, registry.newest_version(name) + 1):
        try:
            yield registry.resolve(name, version)
        except VersionDeleted:
            continue


def delete_version(store: BlobStore, name: str, version: int) -> DeletedVersion:
    """Replace a version's manifest by a tombstone.

    Its number stays taken, its blobs go with the next runs of `gc`, its reports go now.

    Raises `NotFound`, `VersionDeleted`. Tags are left: one that points at it resolves to `VersionDeleted` until it is
    set anew.
    """
    registry = Registry(store)
    resolved = registry.resolve(name, version)
    key = layout.manifest_key(name, version)
    tombstone = Tombstone(name=name, version=version, digest=resolved.digest)
    store.put(key, canonical_json(tombstone), mode="overwrite")
    for info in store.list(key.removesuffix("json")):
        if layout.is_report_key(info.key, name, version):
            store.delete(info.key)
    dangling = tuple(tag for tag, target in registry.tags(name).items() if target == version)
    return DeletedVersion(name, version, resolved.digest, dangling)


def fsck(store: BlobStore, name: str | None = None) -> FsckReport:
    """Read every manifest and tag, and every blob that a version names from the first byte to the last.

    Of the model ``name``, or of all. Nothing is changed.
    """
    registry = Registry(store)
    names = registry.models() if name is None else [name]
    blobs: dict[str, tuple[Descriptor, str]] = {}
    problems: list[str] = []
    versions = 0
    for model in names:
        for version in range(1, registry.newest_version(model) + 1):
            try:
                manifest = registry.resolve(model, version).manifest
            except VersionDeleted:
                continue
            except StorageError as error:
                problems.append(_problem(f"{model} version {version}", error))
                continue
            versions += 1
            for blob in manifest.named_blobs():
                blobs.setdefault(blob.digest, (blob, f"{model} version {version}"))
        problems.extend(_tag_problems(registry, model))
    read_bytes = 0
    with ThreadPoolExecutor(_FSCK_THREADS) as pool:
        for seen_bytes, problem in pool.map(lambda item: _check_blob(store, *item), blobs.values()):
            read_bytes += seen_bytes
            problems.extend([problem] if problem else [])
    return FsckReport(len(names), versions, len(blobs), read_bytes, tuple(problems))


def _tag_problems(registry: Registry, name: str) -> Iterator[str]:
    for tag in registry.tags(name):
        try:
            registry.resolve(name, tag)
        except StorageError as error:
            yield _problem(f"{name} tag {tag!r}", error)
            continue
        state = registry.tag_log(name, tag).state()
        entry = state.entry
        if entry is not None and state.moved_by_older() is None and state.copy != entry.record():
            yield (
                f"{name} tag {tag!r}: entry {entry.number} names version {entry.version}, and the copy for "
                f"older releases {_copy_fault(state)}; 'nestquant tag {name}@{entry.version} {tag}' writes it anew"
            )


def _copy_fault(state: TagState) -> str:
    if state.damage:
        return "cannot be read"
    return "is missing" if state.copy is None else f"says version {state.copy.version}"


def _problem(where: str, error: StorageError) -> str:
    """Say what was found, without the advice to run fsck."""
    if isinstance(error, Corrupt):
        return f"{where}: {error.key}: expected {error.expected}, seen {error.seen}"
    return f"{where}: {error}"


def _check_blob(store: BlobStore, blob: Descriptor, where: str) -> tuple[int, str | None]:
    """Read a blob piece by piece, so that any size fits in memory."""
    try:
        digest, size_bytes = digest_pieces(store.stream(layout.blob_key(blob.digest)))
    except StorageError as error:
        return 0, _problem(where, error)
    if (digest, size_bytes) == (blob.digest, blob.size_bytes):
        return size_bytes, None
    key = layout.blob_key(blob.digest)
    return size_bytes, f"{where}: {key}: expected {blob.size_bytes} bytes, seen {size_bytes} with {digest}"
