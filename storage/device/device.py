"""The device: pull a version part-bit, upgrade it, downgrade it, go back, and never be left with half of one.

Every change follows one order: write down what is coming (``pending``), bring its blobs one by one, make it ``current``
in one step, then sweep what nothing names any more. A process killed anywhere leaves the model as it was, and the next
run goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from storage.device.cache import Cache, Installed, State, blobs_of
from storage.device.errors import ContentError, DeviceError, GaveUp, NotInstalled, NotOurs, SourceError, Untrusted
from storage.device.install import Installation, moved, need_source
from storage.device.pace import Pace
from storage.device.report import Event, Moved, Phase, Reporter, Status, Verified
from storage.device.resolve import Release, resolve_unsigned, was_deleted
from storage.device.retry import Retry
from storage.device.soundness import drop, fault, inventory
from storage.device.source import Documents, Source, StoreSource
from storage.device.sweep import named, settle, sweep
from storage.errors import VersionDeleted
from storage.manifest import Descriptor, Manifest
from storage.signing.rollouts import Member
from storage.stores.local import LocalStore

if TYPE_CHECKING:
    from storage.device.trust import Trust


@dataclass
class Device:
    """Models in one cache folder, and the source they come from.

    ``root_of_trust``: a root of the store (``storage.signing.root.create_root``), needed until the cache has pinned
    one. ``unsigned=True`` takes the store's word instead: nothing is verified but digests, and a signed version is
    replaced by an unsigned one with ``replace_signed=True`` alone. ``device_id`` and ``cohorts``: which signed rollouts
    take this device; the id is never sent anywhere, and without one it comes last. ``source=None``: offline; everything
    but ``resolve``, ``pull`` and ``upgrade`` works.
    """

    root: Path
    source: Source | None = None
    unsigned: bool = False
    replace_signed: bool = False
    root_of_trust: bytes | None = None
    device_id: str | None = None
    cohorts: frozenset[str] = frozenset()
    retry: Retry = field(default_factory=Retry)
    pace: Pace = field(default_factory=Pace)
    on_event: Callable[[Event], None] = lambda _: None
    lock_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        self._cache = Cache(Path(self.root))

    def resolve(self, name: str, ref: str = "latest") -> Release:
        """Find a version by tag, number or digest and check its manifest; only trusted metadata is written."""
        if self.unsigned:
            return self._resolve(name, ref)
        with self._lock():
            return self._resolve(name, ref)

    def pull(self, name: str, ref: str = "latest", *, level: int | None = None) -> Moved:
        """Bring a version: base, then high shards, in execution order.

        ``level`` asks for low shards too; by default a model that is already here keeps the level it runs at, and a new
        one gets 0. Only blobs that the cache does not hold travel, and those that are damaged: each that is here is
        hashed. The version in use stays until the new one is whole, and then as the one to roll back to.
        """
        with self._lock():
            release, state = self._resolve(name, ref), self._cache.state(name)
            release = self._unless_signed(state, release)
            same = state.current is not None and state.current.digest == release.digest
            floor = state.current.level if state.current else 0
            target = floor if level is None else max(level, floor) if same else level
            return self._install(state, release, _level(release.manifest, target))

    def upgrade(self, name: str, level: int | None = None) -> Moved:
        """Bring the low shards of the version in use up to ``level`` (default: all).

        High shards never travel again, unless they are damaged: each that is here is hashed. Raises ``Untrusted`` or
        ``VersionDeleted`` where the version was withdrawn since it was pulled.
        """
        with self._lock(name):
            state, current = self._cache.state(name), self._cache.current(name)
            self._refuse_withdrawn(name, current)
            manifest = self._cache.manifest(name, current)
            target = _level(manifest, manifest.level_count() - 1 if level is None else level)
            raw = self._cache.manifest_bytes(name, current.digest)
            return self._install(
                state, Release(manifest, current.digest, raw, current.signed), max(target, current.level)
            )

    def downgrade(self, name: str, level: int = 0) -> Moved:
        """Delete low shards above ``level``, of ``previous`` too; those that another model shares stay."""
        with self._lock(name):
            state, current = self._cache.state(name), self._cache.current(name)
            target = min(current.level, _level(self._cache.manifest(name, current), level))
            previous = state.previous and state.previous.model_copy(update={"level": min(state.previous.level, target)})
            current = current.model_copy(update={"level": target})
            swept = settle(self._cache, State(name=name, current=current, previous=previous))
            return moved(name, current, freed_bytes=self._reporter(name).swept(swept))

    def rollback(self, name: str) -> Moved:
        """Make the previous version the current one, offline; a second call goes forward again.

        It is hashed first: a version that is damaged, or lacks a blob, does not come into use.
        """
        with self._lock(name):
            state, current = self._cache.state(name), self._cache.current(name)
            previous = state.previous
            if previous is None:
                raise NotInstalled(f"{name}: no earlier version in {self.root} to go back to")
            blobs = blobs_of(self._cache.manifest(name, previous), previous.level)
            faults = [reason for blob in blobs if (reason := fault(self._cache, blob)) is not None]
            if faults:
                raise ContentError(
                    f"{name} version {previous.version} is not whole, so {name} stays at version {current.version}: "
                    f"{len(faults)} of {len(blobs)} blobs: {faults[0]}; 'nestquant pull {name}@{previous.version}' "
                    "brings it anew"
                )
            swept = settle(self._cache, State(name=name, current=previous, previous=current))
            return moved(name, previous, freed_bytes=self._reporter(name).swept(swept))

    def remove(self, name: str) -> int:
        """Forget a model; return the bytes freed. What was last trusted for it stays: it cannot come back older.

        Needs no space, and no more of the model than its folder: what is damaged can be removed, too.
        """
        tell = self._reporter(name)
        with self._lock(name):
            let_go = named(self._cache, name)
            self._cache.drop_state(name)
            freed = tell.swept(sweep(self._cache, let_go))
            for stays in self._cache.forget(name):
                tell.warning(f"models/{name}: {stays} is not ours and stays")
            return freed

    def verify(self, name: str, *, discard: bool = False) -> Verified:
        """Hash everything of a model that may come into use, offline: the version in use and the one to go back to.

        Each at its level. ``discard`` deletes damaged blobs, so that ``pull`` brings them again.
        """
        tell = self._reporter(name)
        versions, blobs, damaged = inventory(self._cache, name)
        for index, blob in enumerate(blobs):
            reason = fault(self._cache, blob)
            if reason is not None and discard:
                with self._lock(name):
                    reason = self._drop_damaged(blob)
            if reason is not None:
                damaged.append(reason)
            tell.blob(self._cache.path_of(blob), (0, 0), (index, len(blobs)))
        size_bytes = sum(blob.size_bytes for blob in blobs)
        current, previous = versions[0], versions[1] if len(versions) > 1 else None
        back = None if previous is None else previous.version
        return Verified(name, current.version, current.level, len(blobs), size_bytes, tuple(damaged), back)

    def drop_damaged(self, blob: Descriptor) -> str | None:
        """Hash a blob again and delete it if it is not right; return what was wrong, None where it is right.

        For a reader that met wrong bytes (``blob_path`` looks at the length alone): once the blob is gone, ``levels``
        tells what still runs, and the next ``pull`` or ``upgrade`` brings it anew, as it would have without this.
        """
        with self._lock():
            return self._drop_damaged(blob)

    def _drop_damaged(self, blob: Descriptor) -> str | None:
        reason = fault(self._cache, blob)
        if reason is not None:
            drop(self._cache, blob)
        return reason

    def status(self, name: str) -> Status:
        """Say what the cache holds of a model; reads the disk alone."""
        state = self._cache.state(name)
        if state.current is None:
            return Status(name, _phase(state), state, (), 0, 0)
        manifest = self._cache.manifest(name, state.current)
        size_bytes = sum(blob.size_bytes for blob in blobs_of(manifest, state.current.level))
        return Status(name, _phase(state), state, self.levels(name), manifest.level_count(), size_bytes)

    def names(self) -> list[str]:
        """Return the models in the cache, sorted."""
        return self._cache.names()

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of the version in use, checked against its digest."""
        return self._cache.manifest(name, self._cache.current(name))

    def levels(self, name: str) -> tuple[int, ...]:
        """Return the levels of the version in use that are here whole, without a gap: ``(0,)`` runs part-bit."""
        manifest = self.manifest(name)
        whole = [
            k for k in range(manifest.level_count()) if all(self._cache.holds(blob) for blob in blobs_of(manifest, k))
        ]
        return tuple(whole)

    def blob_path(self, blob: Descriptor) -> Path:
        """Return the file of a blob; raise ``NotInstalled`` when it is not here in its full length."""
        if not self._cache.holds(blob):
            raise NotInstalled(f"{blob.digest} is not in {self.root}; pull or upgrade the model first")
        return self._cache.path_of(blob)

    def _resolve(self, name: str, ref: str) -> Release:
        if self.unsigned:
            return resolve_unsigned(self._documents(name), name, ref)
        current = self._cache.state(name).current
        member = Member(self.device_id, self.cohorts, None if current is None else current.version)
        return self._trust().resolve(self._documents(name), name, ref, member)

    def _unless_signed(self, state: State, release: Release) -> Release:
        """Let no version that nobody signed replace a signed one, unless that was said; the same bytes stay signed."""
        current = state.current
        if release.signed or current is None or not current.signed:
            return release
        if release.digest == current.digest:
            return replace(release, signed=True)
        if not self.replace_signed:
            raise Untrusted(
                f"{state.name} version {current.version} here is signed, and version {release.manifest.version} of the "
                "source is taken unsigned; say --replace-signed, too, to give up the signature"
            )
        return release

    def _refuse_withdrawn(self, name: str, current: Installed) -> None:
        """Build no further on a version that its publisher took back; where nothing tells, say so and go on."""
        if self.source is None:
            return
        if not current.signed:
            if was_deleted(self._documents(name), name, current.version):
                raise VersionDeleted(f"{name} version {current.version} was deleted from the source; pull another one")
            return
        try:
            vouched = self._trust().vouches(self._documents(name), name, current.digest)
        except (SourceError, GaveUp, Untrusted) as error:
            self._reporter(name).warning(f"whether version {current.version} still counts is unknown: {error}")
            return
        if not vouched:
            raise Untrusted(
                f"{name} version {current.version} was withdrawn by its publisher and stays as it is; "
                f"'nestquant pull {name}' brings the one that counts"
            )

    def _documents(self, name: str) -> Documents:
        return Documents(need_source(self.source), self.retry, self.pace, self._reporter(name).retry)

    def _trust(self) -> Trust:
        from storage.device.trust import Trust  # python-tuf takes 20 MB and 0.3 s

        return Trust(self._cache.root, self.root_of_trust)

    def _install(self, state: State, release: Release, level: int) -> Moved:
        tell = self._reporter(state.name)
        return Installation(self._cache, self.source, self.retry, self.pace, tell).run(state, release, level)

    def _reporter(self, name: str) -> Reporter:
        return Reporter(name, self.on_event)

    def _lock(self, name: str | None = None) -> AbstractContextManager[None]:
        """Hold the cache. With the ``name`` of a model that is not there nothing is made, not even the lock."""
        if name is not None and not self._cache.knows(name):
            raise NotInstalled(f"{name} is not in {self.root}; pull it first")
        store = self.source.store if isinstance(self.source, StoreSource) else None
        if (
            isinstance(store, LocalStore)
            and self._cache.root.exists()
            and store.root.exists()
            and store.root.samefile(self._cache.root)
        ):
            raise NotOurs(f"{self.root}: the store that is pulled from; choose another folder for the cache")
        return self._cache.lock(self.lock_timeout_s)


def _phase(state: State) -> Phase:
    if state.pending is not None:
        return "failed" if state.failed else "partial"
    return "ready" if state.current else "absent"


def _level(manifest: Manifest, level: int) -> int:
    if not 0 <= level < manifest.level_count():
        raise DeviceError(
            f"{manifest.name} version {manifest.version} has levels 0 to {manifest.level_count() - 1}, not {level}"
        )
    return level
