"""Bytes that came from the store: counted as they come, by the day, and stopped when the agent says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from storage.device.errors import DeviceError
from storage.device.files import disk_errors, read_file, replace_file
from storage.device.source import Body, Source
from storage.document import parse_record
from storage.manifest import Record, canonical_json


class Stopped(DeviceError):
    """The agent changed its mind while bytes came; what is staged stays, and the next fetch goes on from there."""


class _Day(Record):
    schema_version: Literal[1] = 1
    day: str
    received_bytes: int = Field(ge=0)


@dataclass(frozen=True)
class CountedSource:
    """A source whose every byte is counted before it is passed on. ``stop``: raise ``Stopped`` in mid-answer."""

    source: Source
    count: Callable[[int], None]
    stop: threading.Event

    @contextmanager
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        """Open ``key`` as the source does."""
        with self.source.open(key, start=start, etag=etag) as body:
            yield replace(body, chunks=self._pass_on(body.chunks))

    def _pass_on(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.count(len(chunk))
            if self.stop.is_set():
                raise Stopped("stopped: the signals speak against it now; it goes on from there")
            yield chunk


class Traffic:
    """Bytes of one day (UTC), in a file, so that a restart does not forget them."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            self._day = parse_record(read_file(path, max_bytes=1 << 12), _Day)
        except (OSError, ValueError):
            self._day = _Day(day="", received_bytes=0)
        self.total_bytes = 0

    def add(self, day: str, count: int) -> None:
        """So many bytes came on a day."""
        with self._lock:
            self._day = _Day(day=day, received_bytes=self._of(day) + count)
            self.total_bytes += count

    def of(self, day: str) -> int:
        """Return the bytes of a day, 0 for any but the last."""
        with self._lock:
            return self._of(day)

    def save(self) -> None:
        """Write it down. Raises ``CacheError``."""
        with disk_errors(str(self._path)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, canonical_json(self._day))

    def _of(self, day: str) -> int:
        return self._day.received_bytes if self._day.day == day else 0
