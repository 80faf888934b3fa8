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
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import Field

from storage.device.errors import CacheBusy, CacheError, NotInstalled
from storage.device.files import (
    FOLDER_MODE,
    check_file,
    check_folder,
    disk_errors,
    flush,
    is_file,
    make_folder,
    read_file,
    replace_file,
)
from storage.device.ownership import Found, check, claim, walk
from storage.digest import digest_bytes, digest_hex
from storage.document import parse_record
from storage.files import read_verified
from storage.layout import blob_key, model_prefix
from storage.manifest import (
    MAX_MANIFEST_BYTES,
    Descriptor,
    Digest,
    Manifest,
    ModelName,
    Record,
    ShardDescriptor,
    canonical_json,
    parse_manifest,
)
from storage.stores.blob_store import check_key
from storage.wording import system_text

_MAX_STATE_BYTES = 1 << 20


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
    """Return the blobs a version needs at ``level``, in fetching order: what all levels share, then each level in
    execution order.
    """
    blobs: list[Descriptor] = [*manifest.shared_blobs()]
    for k in range(min(level + 1, manifest.level_count())):
        blobs += [group.levels[k] for group in manifest.groups if k < len(group.levels)]
    return list({descriptor.digest: descriptor for descriptor in blobs}.values())


def forms_of(blob: Descriptor) -> tuple[Descriptor, ...]:
    """Return the forms in which a cache may hold a blob: as it is, and a shard in its canonical form, too."""
    if not isinstance(blob, ShardDescriptor) or blob.canonical is None:
        return (blob,)
    return blob, Descriptor(**blob.canonical.model_dump(), media_type=blob.media_type)


def read_blob(path: Path, blob: Descriptor) -> bytes:
    """Read the file of a blob whole, and verify it by the form that its name says it is in.

    Raises:
        Damaged: the bytes are others than the form's.
        OSError: the file cannot be read.
    """
    form = next((form for form in forms_of(blob) if path.name == digest_hex(form.digest)), blob)
    return read_verified(path, digest=form.digest, size_bytes=form.size_bytes)


class Cache:
    """The files under one root. Whoever changes them holds ``lock()``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def lock(self, timeout_s: float) -> Iterator[None]:
        """Hold the cache for writing; an empty or absent folder becomes one.

        Raises ``CacheBusy`` when another process keeps it longer than ``timeout_s``, ``NotOurs`` where the folder is
        not a cache's.
        """
        with disk_errors(f"cache {self.root}"):
            check(self.root)  # before the lock is written
            self.root.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        # Made with this mode whatever the umask; a file that merely is there would outlive its holder.
        lock = FileLock(self.root / "lock", timeout=timeout_s, mode=0o600, fallback_to_soft=False)
        with disk_errors(str(self.root / "lock")):
            check_file(self.root / "lock")
            try:
                lock.acquire()
            except Timeout as error:
                raise CacheBusy(f"another process works on {self.root}; waited {timeout_s:g} s") from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                raise CacheError(
                    f"{self.root}: this file system has no locks ({system_text(error)}); choose another folder for the "
                    "cache, or mount it with locks"
                ) from error
        try:
            with disk_errors(f"cache {self.root}"):
                claim(self.root)
            yield
        finally:
            lock.release()

    def blob_path(self, digest: str) -> Path:
        """Return where the blob stands once it is whole."""
        return self.root / blob_key(digest)

    def part_path(self, digest: str) -> Path:
        """Return where the blob's bytes are gathered."""
        return self.root / "staging" / f"{digest_hex(digest)}.part"

    def holds(self, descriptor: Descriptor) -> bool:
        """Tell whether the blob is there in its full length (its SHA-256 was checked before it got its name)."""
        return self.form(descriptor) is not None

    def form(self, descriptor: Descriptor) -> Descriptor | None:
        """Return the form in which a blob is there in its full length, None where it is not."""
        return next((form for form in forms_of(descriptor) if self._holds_file(form)), None)

    def path_of(self, descriptor: Descriptor) -> Path:
        """Return the file of a blob in the form that is there, or where it will stand."""
        return self.blob_path((self.form(descriptor) or descriptor).digest)

    def _holds_file(self, descriptor: Descriptor) -> bool:
        try:
            status = self.blob_path(descriptor.digest).stat(
                follow_symlinks=False
            )  # once: another process may take it away between two looks
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == descriptor.size_bytes

    def state(self, name: str) -> State:
        """Read a model's state; an empty one when the cache does not know the model."""
        path = self.state_path(name)
        if not os.path.lexists(path):
            return State(name=name)
        with disk_errors(str(path)):
            raw = read_file(path, max_bytes=_MAX_STATE_BYTES)
        try:
            state = parse_record(raw, State)
            if state.name != name:
                raise ValueError(f"it is that of {state.name}")
        except ValueError as error:
            raise CacheError(f"{path} is not the state of {name} ({error}); remove {name} and pull it again") from error
        return state

    def state_path(self, name: str) -> Path:
        """Return the file that says what is installed of a model."""
        return self.model_folder(name) / "state.json"

    def write_state(self, state: State) -> None:
        """Replace a model's state in one step."""
        self._write(self.state_path(state.name), canonical_json(state))

    def current(self, name: str) -> Installed:
        """Return the version in use; raise ``NotInstalled`` when there is none."""
        current = self.state(name).current
        if current is None:
            raise NotInstalled(f"{name} is not in {self.root}; pull it first")
        return current

    def manifest_bytes(self, name: str, digest: str) -> bytes:
        """Read a stored manifest's bytes and check them against its digest."""
        path = self.manifest_path(name, digest)
        with disk_errors(str(path)):
            raw = read_file(path, max_bytes=MAX_MANIFEST_BYTES)
        if digest_bytes(raw) != digest:
            raise CacheError(f"{path} is damaged; pull {name} again")
        return raw

    def manifest(self, name: str, version: Installed) -> Manifest:
        """Read a stored manifest as strictly as when it came. Raises ``CacheError``, ``InvalidManifest``."""
        return parse_manifest(self.manifest_bytes(name, version.digest), name=name, version=version.version)

    def manifest_path(self, name: str, digest: str) -> Path:
        """Return where a manifest is kept."""
        return self.model_folder(name) / "manifests" / f"{digest_hex(digest)}.json"

    def write_manifest(self, name: str, digest: str, raw: bytes) -> None:
        """Keep a manifest's exact bytes; where they are here already, nothing is written."""
        with contextlib.suppress(CacheError):
            if self.manifest_bytes(name, digest) == raw:
                return
        self._write(self.manifest_path(name, digest), raw)

    def commit(self, digest: str) -> None:
        """Give a checked, flushed blob its final name."""
        part, final = self.part_path(digest), self.blob_path(digest)
        with disk_errors(str(final)):
            make_folder(self.root, final.parent)
            check_file(final)
            part.replace(final)
            flush(final.parent)
            part.with_suffix(".etag").unlink(missing_ok=True)

    def discard(self, digest: str) -> int:
        """Drop the staged bytes of a blob; return their number."""
        part = self.part_path(digest)
        with disk_errors(str(part)):
            check_folder(self.root, part.parent)
            dropped = part.stat().st_size if is_file(part) else 0
            for path in (part, part.with_suffix(".etag")):
                if is_file(path):
                    path.unlink()
        return dropped

    def model_folder(self, name: str) -> Path:
        """Return a model's folder; raise ``BadKey`` for a name that no file system should be given.

        ``NotOurs`` where a link stands in its place: what is behind one is not read either.
        """
        folder = self.root / check_key(model_prefix(name).rstrip("/"))
        check_folder(self.root, folder)
        return folder

    def knows(self, name: str) -> bool:
        """Tell whether there is anything of the model, if only the remains of a removal that was killed."""
        folder = self.model_folder(name)
        if not folder.is_dir():
            return False
        files = self._files_of(name)
        return not files or any(file.kind is not None for file in files)

    def names(self) -> list[str]:
        """Return the models that the cache knows, sorted."""
        with disk_errors(f"cache {self.root}"):
            states = [entry.path for entry in walk(self.root, "models") if entry.kind == "state"]
        return sorted(path.parent.name for path in states if path.name == "state.json")

    def drop_state(self, name: str) -> None:
        """Remove a model's state: from now on nothing keeps its blobs. Needs no space."""
        with disk_errors(str(self.state_path(name))):
            for file in self._files_of(name):
                if file.kind == "state":
                    file.path.unlink()

    def forget(self, name: str) -> list[str]:
        """Remove what else is ours in a model's folder, and the folder; return the names that are not ours and stay."""
        files = self._files_of(name)
        folder = self.model_folder(name)
        with disk_errors(str(folder)):
            for file in files:
                if file.kind is not None:
                    file.path.unlink()
            for empty in (folder / "manifests", folder):
                with contextlib.suppress(OSError):  # somebody's files stand in it
                    empty.rmdir()
        return [file.name.removeprefix(f"models/{name}/") for file in files if file.kind is None]

    def _files_of(self, name: str) -> list[Found]:
        return list(walk(self.root, f"models/{name}"))

    def _write(self, path: Path, data: bytes) -> None:
        with disk_errors(str(path)):
            make_folder(self.root, path.parent)
            replace_file(path, data)
