"""The device's cache: which bytes are whole, which are under way, and what is installed.

    <root>/.nestquant-cache                     marks the folder as a cache's (``storage.device.ownership``)
    <root>/lock                                 one writer at a time; the system frees it when its holder dies
    <root>/blobs/sha256/<2 hex>/<64 hex>        whole and checked; shared between models and versions
    <root>/staging/<64 hex>.part                a blob under way; hashed again before it is continued
    <root>/staging/<64 hex>.etag                the strong entity tag those bytes were served under
    <root>/models/<name>/state.json             what is installed (``State``), canonical JSON
    <root>/models/<name>/manifests/<64 hex>.json  the manifests that the state names, by digest, byte for byte
    <root>/trust/                               signed metadata last trusted (``storage.device.trust``)

A file gets its final name by one rename, after its bytes were flushed: at any instant a name holds either nothing or
the right bytes. Blobs are counted by the manifests that name them; nothing else keeps a count.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from storage.device.errors import CacheBusy, CacheError, NoSpace, NotInstalled
from storage.device.ownership import Found, check, check_folder, claim, walk
from storage.digest import digest_hex
from storage.layout import blob_key, model_prefix
from storage.manifest import Descriptor, Digest, Manifest, ModelName, Record, canonical_json
from storage.stores.blob_store import check_key

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Installed(Record):
    """A version in the cache. ``level``: the highest level that it is meant to have whole; 0 is high alone."""

    version: int = Field(ge=1)
    digest: Digest
    level: int = Field(ge=0)
    signed: bool


class State(Record):
    """What one model's folder holds.

    ``current`` is whole and in use; ``previous`` is whole and what ``rollback`` returns to; ``pending`` is under way;
    ``failed`` says why the last attempt at ``pending`` ended.
    """

    schema_version: Literal[1] = 1
    name: ModelName
    current: Installed | None = None
    previous: Installed | None = None
    pending: Installed | None = None
    failed: str | None = None

    def installed(self) -> list[Installed]:
        """Return every version whose blobs must stay."""
        return [version for version in (self.current, self.previous, self.pending) if version is not None]


def blobs_of(manifest: Manifest, level: int) -> list[Descriptor]:
    """Return the blobs a version needs at ``level``, in fetching order: base, then each level in execution order."""
    wanted: list[Descriptor] = list(manifest.base)
    for k in range(level + 1):
        wanted += [group.levels[k] for group in manifest.groups if k < len(group.levels)]
    return list({descriptor.digest: descriptor for descriptor in wanted}.values())


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an ``OSError`` of the device's disk into one line that names the file and what to try."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace(f"{what}: {error.strerror}; free space or downgrade a model, then run again") from error
        raise CacheError(f"{what}: {error.strerror or error}") from error


class Cache:
    """The files under one root. Whoever changes them holds ``lock()``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def lock(self, timeout_s: float) -> Iterator[None]:
        """Hold the cache for writing; an empty or absent folder becomes one.

        Raises ``CacheBusy`` when another process keeps it longer than ``timeout_s``, ``ForeignFolder`` where the folder
        is not a cache's.
        """
        with disk_errors(f"cache {self.root}"):
            check(self.root)  # before the lock is written
            self.root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.root / "lock", timeout=timeout_s):
                with disk_errors(f"cache {self.root}"):
                    claim(self.root)
                yield
        except Timeout as error:
            raise CacheBusy(f"another process works on {self.root}; waited {timeout_s:g} s") from error

    def blob_path(self, digest: str) -> Path:
        """Return where the blob stands once it is whole."""
        return self.root / blob_key(digest)

    def part_path(self, digest: str) -> Path:
        """Return where the blob's bytes are gathered."""
        return self.root / "staging" / f"{digest_hex(digest)}.part"

    def holds(self, descriptor: Descriptor) -> bool:
        """Tell whether the blob is there in its full length (its SHA-256 was checked before it got its name)."""
        path = self.blob_path(descriptor.digest)
        return path.is_file() and path.stat().st_size == descriptor.size_bytes

    def state(self, name: str) -> State:
        """Read a model's state; an empty one when the cache does not know the model."""
        path = self.model_folder(name) / "state.json"
        with disk_errors(str(path)):
            if not path.exists():
                return State(name=name)
            raw = path.read_bytes()
        try:
            return State.model_validate_json(raw)
        except ValidationError as error:
            raise CacheError(f"{path} is not a state file; delete the model's folder and pull again") from error

    def write_state(self, state: State) -> None:
        """Replace a model's state in one step."""
        self._write(self.root / "models" / state.name / "state.json", canonical_json(state))

    def current(self, name: str) -> Installed:
        """Return the version in use; raise ``NotInstalled`` when there is none."""
        current = self.state(name).current
        if current is None:
            raise NotInstalled(f"{name} is not in {self.root}; pull it first")
        return current

    def manifest_bytes(self, name: str, digest: str) -> bytes:
        """Read a stored manifest's bytes and check them against its digest."""
        path = self._manifest_path(name, digest)
        with disk_errors(str(path)):
            raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != path.stem:
            raise CacheError(f"{path} is damaged; pull {name} again")
        return raw

    def manifest(self, name: str, digest: str) -> Manifest:
        """Read a stored manifest, checked."""
        return Manifest.model_validate_json(self.manifest_bytes(name, digest))

    def _manifest_path(self, name: str, digest: str) -> Path:
        return self.model_folder(name) / "manifests" / f"{digest_hex(digest)}.json"

    def write_manifest(self, name: str, digest: str, raw: bytes) -> None:
        """Keep a manifest's exact bytes."""
        self._write(self._manifest_path(name, digest), raw)

    def commit(self, digest: str) -> None:
        """Give a checked, flushed blob its final name."""
        part, final = self.part_path(digest), self.blob_path(digest)
        with disk_errors(str(final)):
            self.make_folder(final.parent)
            part.replace(final)
            _flush_folder(final.parent)
            part.with_suffix(".etag").unlink(missing_ok=True)

    def discard(self, digest: str) -> int:
        """Drop the staged bytes of a blob; return their number."""
        part = self.part_path(digest)
        with disk_errors(str(part)):
            dropped = part.stat().st_size if part.exists() else 0
            part.unlink(missing_ok=True)
            part.with_suffix(".etag").unlink(missing_ok=True)
        return dropped

    def model_folder(self, name: str) -> Path:
        """Return a model's folder; raise ``BadKey`` for a name that no file system should be given.

        ``ForeignFolder`` where a link stands in its place: what is behind one is not read either.
        """
        folder = self.root / check_key(model_prefix(name).rstrip("/"))
        check_folder(self.root, folder)
        return folder

    def knows(self, name: str) -> bool:
        """Tell whether there is anything of the model, if only the remains of a removal that was killed."""
        folder = self.model_folder(name)
        if not folder.is_dir():
            return False
        found = self._files_of(name)
        return not found or any(file.kind is not None for file in found)

    def names(self) -> list[str]:
        """Return the models that the cache knows, sorted."""
        states = [found.path for found in walk(self.root, "models") if found.kind == "state"]
        return sorted(path.parent.name for path in states if path.name == "state.json")

    def forget(self, name: str) -> list[str]:
        """Remove a model's state and manifests, the state last; return the names that are not ours and stay."""
        found = self._files_of(name)
        folder = self.model_folder(name)
        with disk_errors(str(folder)):
            for file in sorted(found, key=lambda file: file.kind == "state"):
                if file.kind is not None:
                    file.path.unlink()
            for empty in (folder / "manifests", folder):
                with contextlib.suppress(OSError):  # somebody's files stand in it
                    empty.rmdir()
        return [file.name.removeprefix(f"models/{name}/") for file in found if file.kind is None]

    def _files_of(self, name: str) -> list[Found]:
        self.model_folder(name)
        return list(walk(self.root, f"models/{name}"))

    def sweep(self) -> int:
        """Delete every blob, part and manifest that no state names; return the bytes freed.

        Only files whose whole name is one of ours go: whatever else stands in the folder is somebody's.
        """
        wanted: set[str] = set()
        manifests: set[Path] = set()
        for name in self.names():
            for version in self.state(name).installed():
                blobs = blobs_of(self.manifest(name, version.digest), version.level)
                wanted |= {digest_hex(descriptor.digest) for descriptor in blobs}
                manifests.add(self._manifest_path(name, version.digest))
        freed = 0
        with disk_errors(f"cache {self.root}"):
            ours = [found for found in walk(self.root) if found.kind is not None]
            coming = wanted - {found.stem for found in ours if found.kind == "blob"}
            for found in ours:
                needless = {
                    "blob": found.stem not in wanted,
                    "staged": found.stem not in coming,
                    "manifest": found.path not in manifests,
                }
                if needless.get(found.kind or "", False):
                    found.path.unlink()
                    freed += found.size_bytes if found.kind != "manifest" else 0
        return freed

    def make_folder(self, folder: Path) -> None:
        """Create a folder below the root, each entered in its parent for good; no link is followed."""
        check_folder(self.root, folder)
        if not folder.is_dir():
            if folder != self.root:
                self.make_folder(folder.parent)
            folder.mkdir(parents=folder == self.root, exist_ok=True)
            _flush_folder(folder.parent)

    def _write(self, path: Path, data: bytes) -> None:
        with disk_errors(str(path)):
            self.make_folder(path.parent)
            temporary = path.with_name(f"{path.name}.new")
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's names to the disk (POSIX; a no-op where folders cannot be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
