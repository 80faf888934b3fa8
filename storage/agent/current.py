"""What an engine follows: a small file, renamed into place, that says which version and level run, from which files.

<state>/<name>/current    JSON of ``Current``: a reader sees the old one or the new one, never a part
<state>/<name>/part       the same at part-bit, written before every rise: a drop is one rename, and needs no disk
<state>/<name>/past.json  what the policy remembers
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from storage.agent.policy import Past
from storage.device.cache import Cache, Installed, blobs_of
from storage.device.files import disk_errors, flush, read_file, replace_file
from storage.document import parse_record
from storage.manifest import Digest, Manifest, ModelName, Record, canonical_json

_MAX_BYTES = 8 << 20


class Current(Record):
    """The version and level that run. ``files``: of all blobs of that level, by digest, whole on the disk."""

    schema_version: Literal[1] = 1
    name: ModelName
    version: int = Field(ge=1)
    digest: Digest
    level: int = Field(ge=0)
    level_count: int = Field(ge=1)
    files: dict[Digest, str]


class PastRecord(Record):
    """``Past`` as it outlives the agent; its seconds count from the boot that ``boot_id`` names."""

    schema_version: Literal[1] = 1
    boot_id: str
    switch_s: float | None = None
    rise_s: float | None = None
    calm_since_s: float | None = None
    backoff: int = Field(default=0, ge=0, le=64)


def current_of(cache: Cache, installed: Installed, manifest: Manifest, level: int) -> Current:
    """Return what engines are told of a version at a level."""
    files = {blob.digest: str(cache.path_of(blob).absolute()) for blob in blobs_of(manifest, level)}
    return Current(
        name=manifest.name,
        version=installed.version,
        digest=installed.digest,
        level=level,
        level_count=manifest.level_count(),
        files=files,
    )


def read_current(folder: Path) -> Current | None:
    """Return what runs by ``<folder>/current``; None where it is not there or not one."""
    try:
        return parse_record(read_file(folder / "current", max_bytes=_MAX_BYTES), Current)
    except (OSError, ValueError):
        return None


def publish(folder: Path, current: Current, part: Current) -> None:
    """Rename ``current`` into place; at a higher level ``part`` is laid beside it first.

    Raises ``CacheError`` (``NoSpace`` where the disk is full). A drop to ``part`` that was laid out needs no space.
    """
    with disk_errors(str(folder / "current")):
        folder.mkdir(parents=True, exist_ok=True)
        if current.level:
            replace_file(folder / "part", canonical_json(part))
        elif _is(folder / "part", current):
            (folder / "part").replace(folder / "current")
            flush(folder)
            return
        replace_file(folder / "current", canonical_json(current))


def read_past(folder: Path, boot_id: str, now_s: float) -> Past:
    """Return what the policy remembers; after another boot the dwell time and the calm time begin anew."""
    try:
        record = parse_record(read_file(folder / "past.json", max_bytes=_MAX_BYTES), PastRecord)
    except FileNotFoundError:
        return Past()
    except (OSError, ValueError):
        return Past(switch_s=now_s)
    if record.boot_id != boot_id or (record.switch_s or 0) > now_s:
        return Past(switch_s=now_s, backoff=record.backoff)
    return Past(record.switch_s, record.rise_s, record.calm_since_s, record.backoff)


def write_past(folder: Path, past: Past, boot_id: str) -> None:
    """Write what the policy remembers. Raises ``CacheError``."""
    record = PastRecord(
        boot_id=boot_id,
        switch_s=past.switch_s,
        rise_s=past.rise_s,
        calm_since_s=past.calm_since_s,
        backoff=past.backoff,
    )
    with disk_errors(str(folder / "past.json")):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "past.json", canonical_json(record))


def _is(path: Path, current: Current) -> bool:
    try:
        return read_file(path, max_bytes=_MAX_BYTES) == canonical_json(current)
    except OSError:
        return False
