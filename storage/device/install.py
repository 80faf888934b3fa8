"""Brings a version into use: what is here is hashed, and what is missing or damaged travels."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from storage.device.arrival import Arrival, bring
from storage.device.cache import Cache, Installed, State, blobs_of, forms_of
from storage.device.errors import CacheError, DeviceError, NoSpace
from storage.device.fetch import Fetcher, Traffic
from storage.device.pace import Pace
from storage.device.report import Moved, Reporter
from storage.device.resolve import Release
from storage.device.retry import Retry
from storage.device.soundness import drop, fault
from storage.device.source import Source
from storage.device.sweep import named, sweep
from storage.device.ways import Plan, plan_ways
from storage.errors import StorageError
from storage.manifest import Descriptor


@dataclass(frozen=True)
class Installation:
    """One version on its way into a cache, for the holder of the lock."""

    cache: Cache
    source: Source | None
    retry: Retry
    pace: Pace
    tell: Reporter

    def run(self, state: State, release: Release, level: int) -> Moved:
        """Make a release the version in use at ``level``; the one in use until then becomes the one to go back to."""
        name, manifest = state.name, release.manifest
        target = Installed(version=manifest.version, digest=release.digest, level=level, signed=release.signed)
        blobs = blobs_of(manifest, level)
        damaged = self._drop_damaged(blobs)
        missing = [blob for blob in blobs if not self.cache.holds(blob)]
        self.cache.write_manifest(name, release.digest, release.raw)
        if state.current == target and not missing:
            if state.pending is not None:
                self.cache.write_state(state.model_copy(update={"pending": None, "failed": None}))
            freed_bytes = self.tell.swept(sweep(self.cache))
            return moved(name, target, blobs_kept=len(blobs), saved_bytes=_sum(blobs), freed_bytes=freed_bytes)
        self.cache.write_state(state.model_copy(update={"pending": target, "failed": None}))
        try:
            plans = plan_ways(self.cache, manifest, self._earlier(state) if manifest.deltas else {}, missing)
            self._check_space(plans)
            arrivals, traffic = self._fetch(blobs, plans)
        except DeviceError as error:
            with contextlib.suppress(CacheError):  # the disk may be full; why it failed is told all the same
                self.cache.write_state(state.model_copy(update={"pending": target, "failed": str(error)}))
            raise
        replaced = state.current is not None and state.current.digest != target.digest
        previous = state.current if replaced else state.previous
        let_go = named(self.cache, name)
        self.cache.write_state(State(name=name, current=target, previous=previous))
        freed_bytes = self.tell.swept(sweep(self.cache, let_go))
        return moved(
            name,
            target,
            blobs_moved=len(missing),
            blobs_kept=len(blobs) - len(missing),
            received_bytes=traffic.received_bytes,
            resumed_bytes=traffic.resumed_bytes,
            wasted_bytes=traffic.wasted_bytes,
            saved_bytes=_sum(blobs) - _sum(missing),
            freed_bytes=freed_bytes,
            retries=traffic.retries,
            damaged=damaged,
            deltas=sum(arrival.by_delta for arrival in arrivals),
            spared_bytes=sum(arrival.spared_bytes for arrival in arrivals),
            ways=tuple(arrival.line for arrival in arrivals),
        )

    def _earlier(self, state: State) -> dict[str, Descriptor]:
        """Return the blobs of the versions that are here, by digest: what deltas may start from."""
        blobs: dict[str, Descriptor] = {}
        for version in state.installed():
            with contextlib.suppress(StorageError):  # one that cannot be read is no start, and stops nothing
                blobs |= {blob.digest: blob for blob in self.cache.manifest(state.name, version).descriptors()}
        return blobs

    def _drop_damaged(self, blobs: list[Descriptor]) -> tuple[str, ...]:
        """Hash every blob that is here, for it is about to be relied upon, and delete those that rotted."""
        damaged = []
        for blob in blobs:
            if (
                any(self.cache.blob_path(form.digest).exists() for form in forms_of(blob))
                and (reason := fault(self.cache, blob)) is not None
            ):
                self.tell.warning(f"damaged here, brought anew: {reason}")
                drop(self.cache, blob)
                damaged.append(reason)
        return tuple(damaged)

    def _fetch(self, blobs: list[Descriptor], plans: Mapping[str, Plan]) -> tuple[list[Arrival], Traffic]:
        total, progress_bytes, index = _sum(blobs), 0, 0

        def on_bytes(here: int) -> None:
            self.tell.bytes((progress_bytes + here, total), (index, len(blobs)))

        def on_retry(why: str, wait_s: float) -> None:
            self.tell.retry(why, wait_s, (progress_bytes, total), (index, len(blobs)))

        fetcher = Fetcher(need_source(self.source), self.cache, self.retry, self.pace, on_bytes, on_retry)
        arrivals = []
        for index, blob in enumerate(blobs):
            if not self.cache.holds(blob):
                arrivals.append(bring(fetcher, plans[blob.digest], self.tell.warning))
            progress_bytes += blob.size_bytes
            self.tell.blob(self.cache.path_of(blob), (progress_bytes, total), (index, len(blobs)))
        return arrivals, fetcher.traffic

    def _check_space(self, plans: Mapping[str, Plan]) -> None:
        whole = sum(plan.whole_bytes for plan in plans.values())
        # Deltas go as soon as they are applied: of theirs, the most that lies here at once counts.
        deltas = max((_sum([step.descriptor for step in plan.steps]) for plan in plans.values()), default=0)
        free, need = shutil.disk_usage(self.cache.root).free, whole + deltas
        if need > free:
            raise NoSpace(
                f"{need} bytes to come, {free} free in {self.cache.root}; "
                "free space, downgrade or remove a model, then run again"
            )


def moved(
    name: str, version: Installed, *, damaged: tuple[str, ...] = (), ways: tuple[str, ...] = (), **figures: int
) -> Moved:
    """Return the outcome of an operation that left ``version`` in use."""
    return Moved(
        name, version.version, version.digest, version.level, version.signed, **figures, damaged=damaged, ways=ways
    )


def need_source(source: Source | None) -> Source:
    """Return the source, or say that there is none."""
    if source is None:
        raise DeviceError("no source was given: this needs one (a store, or an https:// address)")
    return source


def _sum(blobs: list[Descriptor]) -> int:
    return sum(blob.size_bytes for blob in blobs)
