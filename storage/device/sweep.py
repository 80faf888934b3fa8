"""What nothing names any more is deleted: blobs, staged bytes, manifests. A bad model keeps no other from that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from storage.device.cache import Cache, State, blobs_of, forms_of
from storage.device.errors import CacheError, NoSpace
from storage.device.files import disk_errors
from storage.device.ownership import Kind, walk
from storage.digest import digest_hex
from storage.errors import StorageError

_ALL: tuple[Kind, ...] = ("blob", "staged", "manifest")


@dataclass(frozen=True)
class Swept:
    """``freed_bytes``: of blobs and staged bytes. ``doubts``: a line for each version that cannot be read."""

    freed_bytes: int
    doubts: tuple[str, ...] = ()


@dataclass
class _Needs:
    """What the states name. ``unreadable``: models whose state cannot be read, so that any manifest may be theirs."""

    blobs: set[str] = field(default_factory=set)
    manifests: set[Path] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    doubts: list[str] = field(default_factory=list)

    def add(self, cache: Cache, state: State) -> None:
        """Count what a state names; a version whose manifest cannot be read becomes a doubt."""
        for version in state.installed():
            self.manifests.add(cache.manifest_path(state.name, version.digest))
            try:
                manifest = cache.manifest(state.name, version)
            except StorageError as error:
                what = f"{state.name} version {version.version}"
                self.doubts.append(f"what {what} needs is unknown, so nothing that may be its own goes: {error}")
            else:
                blobs = [form for blob in blobs_of(manifest, version.level) for form in forms_of(blob)]
                if version == state.pending:  # deltas count as long as what they make is under way
                    blobs += [delta.descriptor for delta in manifest.deltas]
                self.blobs |= {digest_hex(blob.digest) for blob in blobs}


def sweep(
    cache: Cache, let_go: Collection[str] = (), *, ahead: State | None = None, kinds: Collection[Kind] = _ALL
) -> Swept:
    """Delete every blob, part and manifest that no state names; for the holder of the lock.

    Only files whose whole name is one of ours go: whatever else stands in the folder is somebody's.

    Args:
        cache: the cache.
        let_go: digests in hex of blobs that a state named until now. Where some model cannot be read, of all the blobs
            that nothing names only these go: any other may be that model's.
        ahead: counts in the place of the state that its model has.
        kinds: what may be deleted.
    """
    needs = _Needs()
    for name in cache.names():
        try:
            state = ahead if ahead is not None and ahead.name == name else cache.state(name)
        except CacheError as error:
            needs.unreadable.add(name)
            needs.doubts.append(f"what {name} needs is unknown, so nothing that may be its own goes: {error}")
        else:
            needs.add(cache, state)
    freed_bytes = 0
    with disk_errors(f"cache {cache.root}"):
        ours = [entry for entry in walk(cache.root) if entry.kind in _ALL]
        here = {entry.stem for entry in ours if entry.kind == "blob"}
        for entry in [entry for entry in ours if entry.kind in kinds]:
            if entry.kind == "blob":
                needless = entry.stem not in needs.blobs and (not needs.doubts or entry.stem in let_go)
            elif entry.kind == "staged":
                needless = entry.stem not in needs.blobs - here
            else:
                needless = entry.path not in needs.manifests and entry.path.parts[-3] not in needs.unreadable
            if needless:
                entry.path.unlink()
                freed_bytes += entry.size_bytes if entry.kind != "manifest" else 0
    return Swept(freed_bytes, tuple(needs.doubts))


def settle(cache: Cache, state: State) -> Swept:
    """Write a state under which nothing is under way, and sweep: on a full disk, too.

    Where there is no space for the new state, what it lets go goes first: staged bytes, then blobs that it names no
    more. A process killed in between leaves a model that lacks low shards, and runs without them.
    """
    staged: tuple[Kind, ...] = ("staged",)
    blobs: tuple[Kind, ...] = ("blob",)
    let_go, freed_bytes = named(cache, state.name), 0
    try:
        cache.write_state(state)
    except NoSpace:
        freed_bytes = sweep(cache, ahead=state, kinds=staged).freed_bytes
        try:
            cache.write_state(state)
        except NoSpace:
            freed_bytes += sweep(cache, let_go, ahead=state, kinds=blobs).freed_bytes
            cache.write_state(state)
    rest = sweep(cache, let_go)
    return Swept(freed_bytes + rest.freed_bytes, rest.doubts)


def named(cache: Cache, name: str) -> set[str]:
    """Return the digests in hex of the blobs that a model's state names, as far as it can be read."""
    needs = _Needs()
    try:
        needs.add(cache, cache.state(name))
    except CacheError:
        return set()
    return needs.blobs
