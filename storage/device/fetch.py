"""Moves one blob from a source into the cache: resumed, bounded, checked, and tried again within a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from storage.device.cache import Cache
from storage.device.errors import ContentError, NoSpace, SourceChanged, SourceError
from storage.device.pace import Pace
from storage.device.retry import OnRetry, Retry
from storage.device.source import Source
from storage.device.staging import Staged, staging
from storage.manifest import Descriptor


@dataclass
class Traffic:
    """Bytes of one operation: ``received`` from the source, ``resumed`` found staged, ``wasted`` thrown away."""

    received_bytes: int = 0
    resumed_bytes: int = 0
    wasted_bytes: int = 0
    retries: int = 0


@dataclass
class Fetcher:
    """Fetches blobs, one at a time. ``on_bytes(n)``: n bytes are here; ``on_retry(message, s)``: a wait begins."""

    source: Source
    cache: Cache
    retry: Retry = field(default_factory=Retry)
    pace: Pace = field(default_factory=Pace)
    on_bytes: Callable[[int], None] = lambda _: None
    on_retry: OnRetry = lambda _message, _wait: None
    traffic: Traffic = field(default_factory=Traffic)

    def fetch(self, key: str, blob: Descriptor) -> None:
        """Bring ``blob`` under its final name.

        Raises ``GaveUp`` once the budget is spent, ``SourceError`` at once where trying again cannot help,
        ``CacheError`` for the disk.
        """
        with staging(self.cache, blob) as staged:
            self.traffic.resumed_bytes += staged.have

        def on_retry(message: str, wait_s: float) -> None:
            self.traffic.retries += 1
            self.on_retry(message, wait_s)

        self.retry.run(lambda: self._attempt(key, blob), on_retry)

    def _attempt(self, key: str, blob: Descriptor) -> None:
        try:
            with staging(self.cache, blob) as staged:
                self.on_bytes(staged.have)
                if staged.have < blob.size_bytes:
                    self._receive(key, blob, staged)
                staged.check()
            self.cache.commit(blob.digest)
        except (ContentError, SourceChanged, NoSpace):
            self.traffic.wasted_bytes += self.cache.discard(blob.digest)
            raise

    def _receive(self, key: str, blob: Descriptor, staged: Staged) -> None:
        with self.source.open(key, start=staged.have, etag=staged.etag) as body:
            if body.total_bytes not in {None, blob.size_bytes}:
                raise ContentError(
                    f"{key}: the source holds {body.total_bytes} bytes, the manifest says {blob.size_bytes}"
                )
            if body.start != staged.have:  # it sends all of it again
                self.traffic.wasted_bytes += staged.have
                staged.restart()
            staged.served_under(body.etag)
            for chunk in self.pace.keep(body.chunks, key):
                self.traffic.received_bytes += len(chunk)
                staged.write(chunk)
                self.on_bytes(staged.have)
        if staged.have < blob.size_bytes:
            raise SourceError(f"{key}: cut after {staged.have} of {blob.size_bytes} bytes")
