"""What the device tells: events while it works, and the outcome afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.device.cache import State

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
class Moved:
    """What an operation did, and what it cost.

    ``received_bytes`` came from the source, ``wasted_bytes`` of them or of what was staged were thrown away,
    ``resumed_bytes`` were found staged, ``saved_bytes`` were whole in the cache before, ``freed_bytes`` were deleted.
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


@dataclass(frozen=True)
class Verified:
    """Outcome of ``verify``. ``damaged`` holds a line for each blob that is missing or not what its digest says."""

    name: str
    version: int
    level: int
    blobs: int
    size_bytes: int
    damaged: tuple[str, ...]

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
