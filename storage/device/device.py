"""The device: pull a version part-bit, upgrade it, downgrade it, go back, and never be left with half of one.

Every change follows one order: write down what is coming (``pending``), bring its blobs one by one, make it ``current``
in one step, then sweep what nothing names any more. A process killed anywhere leaves the model as it was, and the next
run goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from storage.device.cache import Cache, Installed, State, blobs_of
from storage.device.errors import CacheError, DeviceError, NoSpace, NotInstalled, NotOurs
from storage.device.fetch import Fetcher, Traffic
from storage.device.files import disk_errors
from storage.device.pace import Pace
from storage.device.report import Event, EventKind, Moved, Phase, Status, Verified
from storage.device.resolve import Release, resolve_unsigned
from storage.device.retry import Retry
from storage.device.source import Documents, Source, StoreSource
from storage.device.sweep import Swept, named, settle, sweep
from storage.layout import blob_key
from storage.manifest import Descriptor, Manifest
from storage.stores.local import LocalStore

_BLOCK_BYTES = 1 << 20


@dataclass
class Device:
    """Models in one cache folder, and the source they come from.

    ``root_of_trust``: a root of the store (``storage.signing.root.create_root``), needed until the cache has pinned
    one. ``unsigned=True`` takes the store's word instead: nothing is verified but digests. ``source=None``: offline;
    everything but ``resolve``, ``pull`` and ``upgrade`` works.
    """

    root: Path
    source: Source | None = None
    unsigned: bool = False
    root_of_trust: bytes | None = None
    retry: Retry = field(default_factory=Retry)
    pace: Pace = field(default_factory=Pace)
    on_event: Callable[[Event], None] = lambda _: None
    lock_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        self._cache = Cache(Path(self.root))

    def resolve(self, name: str, ref: str = "latest") -> Release:
        """Find a version by tag or number and check its manifest; nothing is written but trusted metadata."""
        if self.unsigned:
            return self._resolve(name, ref)
        with self._lock():
            return self._resolve(name, ref)

    def _resolve(self, name: str, ref: str) -> Release:
        documents = Documents(self._need_source(), self.retry, self.pace, lambda why, s: self._retrying(name, why, s))
        if self.unsigned:
            return resolve_unsigned(documents, name, ref)
        from storage.device.trust import Trust  # python-tuf takes 20 MB and 0.3 s

        return Trust(self._cache.root / "trust", self.root_of_trust).resolve(documents, name, ref)

    def pull(self, name: str, ref: str = "latest", *, level: int | None = None) -> Moved:
        """Bring a version: base, then high shards, in execution order.

        ``level`` asks for low shards too; by default a model that is already here keeps the level it runs at, and a new
        one gets 0. Only blobs that the cache does not hold travel. The version in use stays until the new one is whole,
        and then as the one to roll back to.
        """
        with self._lock():
            release = self._resolve(name, ref)
            state = self._cache.state(name)
            same = state.current is not None and state.current.digest == release.digest
            floor = state.current.level if state.current else 0
            wanted = floor if level is None else max(level, floor) if same else level
            return self._install(state, release, _level(release.manifest, wanted))

    def upgrade(self, name: str, level: int | None = None) -> Moved:
        """Bring the low shards of the version in use up to ``level`` (default: all). High shards never travel again."""
        with self._lock(name):
            state, current = self._cache.state(name), self._cache.current(name)
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
            return self._moved(name, current, freed_bytes=self._told(name, swept))

    def rollback(self, name: str) -> Moved:
        """Make the previous version the current one, offline; a second call goes forward again."""
        with self._lock(name):
            state, current = self._cache.state(name), self._cache.current(name)
            previous = state.previous
            if previous is None:
                raise NotInstalled(f"{name}: no earlier version in {self.root} to go back to")
            missing = [
                b for b in blobs_of(self._cache.manifest(name, previous), previous.level) if not self._cache.holds(b)
            ]
            if missing:
                raise CacheError(
                    f"{name} version {previous.version}: {missing[0].digest} is gone from {self.root}; pull it again"
                )
            swept = settle(self._cache, State(name=name, current=previous, previous=current))
            return self._moved(name, previous, freed_bytes=self._told(name, swept))

    def remove(self, name: str) -> int:
        """Forget a model; return the bytes freed. What was last trusted for it stays: it cannot come back older.

        Needs no space, and no more of the model than its folder: what is damaged can be removed, too.
        """
        with self._lock(name):
            let_go = named(self._cache, name)
            self._cache.drop_state(name)
            freed = self._told(name, sweep(self._cache, let_go))
            for stays in self._cache.forget(name):
                self._emit("warning", name, (0, 0), (0, 0), message=f"models/{name}: {stays} is not ours and stays")
            return freed

    def verify(self, name: str, *, discard: bool = False) -> Verified:
        """Hash every blob of the version in use again, offline.

        ``discard`` deletes damaged ones, so that ``pull`` brings them again.
        """
        current = self._cache.current(name)
        blobs = blobs_of(self._cache.manifest(name, current), current.level)
        damaged = []
        for index, blob in enumerate(blobs):
            if (fault := self._fault(blob)) is not None:
                damaged.append(fault)
                if discard:
                    with self._lock(name), disk_errors(str(self._cache.blob_path(blob.digest))):
                        self._cache.blob_path(blob.digest).unlink(missing_ok=True)
            self._emit("blob", name, (0, 0), (index, len(blobs)), path=self._cache.blob_path(blob.digest))
        total = sum(blob.size_bytes for blob in blobs)
        return Verified(name, current.version, current.level, len(blobs), total, tuple(damaged))

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
        return self._cache.blob_path(blob.digest)

    def _install(self, state: State, release: Release, level: int) -> Moved:
        name, manifest = state.name, release.manifest
        target = Installed(version=manifest.version, digest=release.digest, level=level, signed=release.signed)
        blobs = blobs_of(manifest, level)
        missing = [blob for blob in blobs if not self._cache.holds(blob)]
        self._cache.write_manifest(name, release.digest, release.raw)
        if state.current == target and not missing:
            if state.pending is not None:
                self._cache.write_state(state.model_copy(update={"pending": None, "failed": None}))
            freed_bytes = self._told(name, sweep(self._cache))
            return self._moved(name, target, blobs_kept=len(blobs), saved_bytes=_sum(blobs), freed_bytes=freed_bytes)
        self._cache.write_state(state.model_copy(update={"pending": target, "failed": None}))
        try:
            self._check_space(missing)
            traffic = self._fetch(name, blobs)
        except DeviceError as error:
            with contextlib.suppress(CacheError):  # the disk may be full; why it failed is told all the same
                self._cache.write_state(state.model_copy(update={"pending": target, "failed": str(error)}))
            raise
        replaced = state.current is not None and state.current.digest != target.digest
        previous = state.current if replaced else state.previous
        let_go = named(self._cache, name)
        self._cache.write_state(State(name=name, current=target, previous=previous))
        swept = sweep(self._cache, let_go)
        moved = {
            "received_bytes": traffic.received_bytes,
            "resumed_bytes": traffic.resumed_bytes,
            "wasted_bytes": traffic.wasted_bytes,
        }
        moved |= {"saved_bytes": _sum(blobs) - _sum(missing), "freed_bytes": self._told(name, swept)}
        counts = {"blobs_moved": len(missing), "blobs_kept": len(blobs) - len(missing), "retries": traffic.retries}
        return self._moved(name, target, **moved, **counts)

    def _fetch(self, name: str, blobs: list[Descriptor]) -> Traffic:
        source, total, done, index = self._need_source(), _sum(blobs), 0, 0

        def on_bytes(here: int) -> None:
            self._emit("bytes", name, (done + here, total), (index, len(blobs)))

        def on_retry(why: str, wait_s: float) -> None:
            self._retrying(name, why, wait_s, (done, total), (index, len(blobs)))

        fetcher = Fetcher(source, self._cache, self.retry, self.pace, on_bytes, on_retry)
        for index, blob in enumerate(blobs):
            if not self._cache.holds(blob):
                fetcher.fetch(blob_key(blob.digest), blob)
            done += blob.size_bytes
            path = self._cache.blob_path(blob.digest)
            self._emit("blob", name, (done, total), (index, len(blobs)), path=path)
        return fetcher.traffic

    def _retrying(
        self, name: str, why: str, wait_s: float, done: tuple[int, int] = (0, 0), at: tuple[int, int] = (0, 0)
    ) -> None:
        self._emit("retry", name, done, at, message=f"{why}; again in {wait_s:.1f} s")

    def _check_space(self, missing: list[Descriptor]) -> None:
        staged = sum(path.stat().st_size for blob in missing if (path := self._cache.part_path(blob.digest)).exists())
        free, need = shutil.disk_usage(self._cache.root).free, _sum(missing) - staged
        if need > free:
            raise NoSpace(
                f"{need} bytes to come, {free} free in {self.root}; "
                "free space, downgrade or remove a model, then run again"
            )

    def _fault(self, blob: Descriptor) -> str | None:
        path = self._cache.blob_path(blob.digest)
        if not path.is_file():
            return f"{blob.digest}: missing"
        with disk_errors(str(path)), path.open("rb") as file:
            hasher = hashlib.sha256()
            while block := file.read(_BLOCK_BYTES):
                hasher.update(block)
            size = file.tell()
        if size != blob.size_bytes:
            return f"{blob.digest}: {size} bytes, expected {blob.size_bytes}"
        seen = f"sha256:{hasher.hexdigest()}"
        return None if seen == blob.digest else f"{blob.digest}: the file's SHA-256 is {seen}"

    def _told(self, name: str, swept: Swept) -> int:
        for doubt in swept.doubts:
            self._emit("warning", name, (0, 0), (0, 0), message=doubt)
        return swept.freed_bytes

    def _emit(
        self,
        kind: EventKind,
        name: str,
        done: tuple[int, int],
        at: tuple[int, int],
        *,
        path: Path | None = None,
        message: str = "",
    ) -> None:
        self.on_event(Event(kind, name, *done, *at, path, message))

    def _moved(self, name: str, version: Installed, **figures: int) -> Moved:
        return Moved(name, version.version, version.digest, version.level, version.signed, **figures)

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

    def _need_source(self) -> Source:
        if self.source is None:
            raise DeviceError("no source was given: this needs one (a store, or an https:// address)")
        return self.source


def _phase(state: State) -> Phase:
    if state.pending is not None:
        return "failed" if state.failed else "partial"
    return "ready" if state.current else "absent"


def _sum(blobs: list[Descriptor]) -> int:
    return sum(blob.size_bytes for blob in blobs)


def _level(manifest: Manifest, level: int) -> int:
    if not 0 <= level < manifest.level_count():
        raise DeviceError(
            f"{manifest.name} version {manifest.version} has levels 0 to {manifest.level_count() - 1}, not {level}"
        )
    return level
