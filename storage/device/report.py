"""What the device tells: events while it works, and the outcome afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.device.cache import State
from storage.device.sweep import Swept

EventKind = Literal["bytes", "blob", "retry", "warning"]
Phase = Literal["absent", "partial", "failed", "ready"]


@dataclass(frozen=True)
class Event:
    """What happens, for progress bars and for those who start on a shard before the next one is there.

    ``blob``: blob ``index`` (from 0) of ``count`` is whole at ``path``; ``bytes``: ``done_bytes`` of ``total_bytes``
    are here; ``retry`` and ``warning``: ``message`` says why.
    """

    kind: EventKind
    name: str
    done_bytes: int
    total_bytes: int
    index: int
    count: int
    path: Path | None = None
    message: str = ""


@dataclass(frozen=True)
class Reporter:
    """Tells what happens to one model. ``size``: bytes here and bytes in all; ``at``: index of the blob, and count."""

    name: str
    on_event: Callable[[Event], None]

    def bytes(self, size: tuple[int, int], at: tuple[int, int]) -> None:
        """So many bytes are here."""
        self.on_event(Event("bytes", self.name, *size, *at))

    def blob(self, path: Path, size: tuple[int, int], at: tuple[int, int]) -> None:
        """A blob is whole."""
        self.on_event(Event("blob", self.name, *size, *at, path))

    def retry(self, why: str, wait_s: float, size: tuple[int, int] = (0, 0), at: tuple[int, int] = (0, 0)) -> None:
        """Something failed and is tried again."""
        self.on_event(Event("retry", self.name, *size, *at, None, f"{why}; again in {wait_s:.1f} s"))

    def warning(self, message: str) -> None:
        """Something is not as it should be, and the work goes on."""
        self.on_event(Event("warning", self.name, 0, 0, 0, 0, None, message))

    def swept(self, swept: Swept) -> int:
        """Say what a sweep could not judge; return the bytes it freed."""
        for doubt in swept.doubts:
            self.warning(doubt)
        return swept.freed_bytes


@dataclass(frozen=True)
class Moved:
    """What an operation did, and what it cost.

    ``received_bytes`` came from the source, ``wasted_bytes`` of them or of what was staged were thrown away,
    ``resumed_bytes`` were found staged, ``saved_bytes`` were whole in the cache before, ``freed_bytes`` were deleted.
    ``damaged``: a line for each blob that was here, was not right, and came anew. ``deltas``: blobs that were made from
    earlier ones, and ``spared_bytes`` what that saved against moving them whole; ``ways``: a line for each blob that
    came, which says how and why.
    """

    name: str
    version: int
    digest: str
    level: int
    signed: bool
    blobs_moved: int = 0
    blobs_kept: int = 0
    received_bytes: int = 0
    resumed_bytes: int = 0
    wasted_bytes: int = 0
    saved_bytes: int = 0
    freed_bytes: int = 0
    retries: int = 0
    damaged: tuple[str, ...] = ()
    deltas: int = 0
    spared_bytes: int = 0
    ways: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """Outcome of ``verify``: ``blobs`` of the version in use and of ``previous``, the one to go back to.

    ``damaged`` holds a line for each blob or manifest that is missing or not what its digest says.
    """

    name: str
    version: int
    level: int
    blobs: int
    size_bytes: int
    damaged: tuple[str, ...]
    previous: int | None = None

    @property
    def whole(self) -> bool:
        """Tell whether every blob is right."""
        return not self.damaged


@dataclass(frozen=True)
class Status:
    """A model in the cache. ``phase``: ``absent``, ``partial`` (under way), ``failed`` (given up), ``ready``."""

    name: str
    phase: Phase
    state: State
    levels: tuple[int, ...]
    level_count: int
    size_bytes: int
