"""A store in a folder: temporary file, fsync, then one atomic link (create) or rename (overwrite).

Needs a POSIX file system with hard links. Concurrent writers, also in other processes, are kept apart by ``link(2)``
failing on an existing name and, for compare-and-swap, by ``flock(2)`` on one file of the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from typing_extensions import override

from storage.digest import Data, file_version
from storage.errors import (
    AccessDenied,
    AlreadyExists,
    BadKey,
    BadStoreURI,
    NoSpace,
    NotFound,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
    UnsafeStore,
)
from storage.files import open_regular
from storage.layout import CACHE_MARKER
from storage.stores.blob_store import BlobStore, ObjectInfo, Opened, PutMode, check_key, check_limit, is_key
from storage.wording import system_text

_PIECE_BYTES = 1 << 20
_TEMPORARY = ".tmp"  # no key begins with a dot, so nothing in there is ever listed
_PART_NAME = re.compile(r"nestquant-[0-9a-f]{32}\.part")  # what a writer of ours leaves when it is killed
_LEFTOVER_AGE_S = 24 * 3600.0


class LocalStore(BlobStore):
    """Objects as files under ``root``, which is made on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.uri = self.root.as_uri()
        self._temporary = self.root / _TEMPORARY
        self._written_to = False

    def sweep(self, *, older_than_s: float) -> int:
        """Remove temporary files that a killed writer of ours left, and return their number.

        The first write does it; reading never removes anything. A file goes only if it is a regular file of our own
        name, in a folder that is not a link; a younger one may belong to a writer at work.
        """
        removed = 0
        try:
            if self._temporary.is_symlink():
                return 0
            leftovers = tuple(os.scandir(self._temporary))
        except (FileNotFoundError, NotADirectoryError):
            return 0
        for leftover in leftovers:
            try:
                status = leftover.stat(follow_symlinks=False)
                ours = _PART_NAME.fullmatch(leftover.name) is not None and stat.S_ISREG(status.st_mode)
                if ours and time.time() - status.st_mtime >= older_than_s:
                    os.unlink(leftover.path)
                    removed += 1
            except FileNotFoundError:  # its writer, or another sweeper, was first
                continue
        return removed

    @override
    def head(self, key: str) -> ObjectInfo:
        with self._errors(key):
            status = self._path(key).stat()
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(self._path(key))
            return _info(key, status)

    @override
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        with self._errors(key), open_regular(self._path(key)) as file:
            check_limit(key, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()

    @override
    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._errors(key), open_regular(self._path(key)) as file:
            file.seek(start)
            return file.read(length)

    @override
    @contextmanager
    def open(self, key: str, *, start: int = 0) -> Iterator[Opened]:
        with self._errors(key):
            file = open_regular(self._path(key))
        with file:  # what its reader raises of its own is no error of this store
            with self._errors(key):
                info = _info(key, os.fstat(file.fileno()))
                file.seek(start)
            yield Opened(info.size_bytes, info.etag, start, self._pieces(key, file))

    def _pieces(self, key: str, file: BinaryIO) -> Iterator[bytes]:
        while True:
            with self._errors(key):
                piece = file.read(_PIECE_BYTES)
            if not piece:
                return
            yield piece

    @override
    def put(self, key: str, data: Data, *, mode: PutMode) -> ObjectInfo:
        with self._errors(key), self._written(key, lambda file: file.write(data)) as (temporary, path):
            if mode == "overwrite":
                with self._lock():
                    return self._replace(key, temporary, path)
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise AlreadyExists(f"{key}: already in {self.uri}", key=key) from None
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise UnsafeStore(
                        f"{self.root}: this file system makes no hard links ({system_text(error)}); choose another "
                        "folder",
                        key=key,
                    ) from error
                raise
            _sync_folder(path.parent)
            return _info(key, temporary.stat())

    @override
    def put_file(self, key: str, path: Path) -> ObjectInfo:
        with path.open("rb") as source:
            written = self._written(key, lambda file: shutil.copyfileobj(source, file, _PIECE_BYTES))
            with self._errors(key), written as (temporary, final), self._lock():
                return self._replace(key, temporary, final)

    @override
    def put_if_match(self, key: str, data: Data, *, etag: str) -> ObjectInfo:
        written = self._written(key, lambda file: file.write(data))
        with self._errors(key), written as (temporary, path), self._lock():
            current = _info(key, path.stat()).etag if path.exists() else None
            if current != etag:
                raise PreconditionFailed(f"{key}: ETag is {current}, expected {etag}", key=key)
            return self._replace(key, temporary, path)

    @override
    def delete(self, key: str) -> None:
        with self._errors(key):
            path = self._path(key)
            if not path.exists():
                return
            self._refuse_cache()
            with self._lock():
                path.unlink(missing_ok=True)
                _sync_folder(path.parent)

    @override
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            yield from sorted(self._walk(prefix.rpartition("/")[0], prefix), key=lambda info: info.key)

    @override
    def folders(self, prefix: str = "") -> Iterator[str]:
        with self._errors(prefix):
            try:
                entries = sorted(os.scandir(self._folder(prefix.rstrip("/"))), key=lambda entry: entry.name)
            except FileNotFoundError:
                return
            for entry in entries:
                if (
                    entry.is_dir()
                    and is_key(entry.name)
                    and next(self._walk(prefix + entry.name, ""), None) is not None
                ):
                    yield entry.name

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _folder(self, folder: str) -> Path:
        return self.root / check_key(folder) if folder else self.root

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = tuple(os.scandir(self._folder(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if not is_key(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(key, prefix)
            elif key.startswith(prefix) and entry.is_file(follow_symlinks=False):
                try:
                    yield _info(key, entry.stat())
                except FileNotFoundError:  # deleted since the folder was read
                    continue

    @contextmanager
    def _written(self, key: str, write: Callable[[BinaryIO], object]) -> Iterator[tuple[Path, Path]]:
        """Let ``write`` fill a temporary file that is gone afterwards, whatever happens, and hand out both paths."""
        path = self._path(key)
        if path.is_dir():
            raise BadKey(f"{key}: is a folder in {self.uri}; a key cannot be both", key=key)
        self._refuse_cache()
        self._temporary.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._written_to:
            self._written_to = True
            self.sweep(older_than_s=_LEFTOVER_AGE_S)
        temporary = self._temporary / f"nestquant-{uuid.uuid4().hex}.part"
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            yield temporary, path
        finally:
            temporary.unlink(missing_ok=True)

    def _refuse_cache(self) -> None:
        """Raise where the folder is a device's: the store's writes would mix with its files, and gc remove them."""
        if self._written_to:
            return
        marker = self.root / CACHE_MARKER
        if not marker.exists():  # as in caches of editions before the marker
            marker = next(self.root.glob("models/*/state.json"), marker)
        if marker.exists():
            raise BadStoreURI(
                f"{self.root} is a device's cache ({marker.relative_to(self.root)} is there); "
                "give the store a folder of its own"
            )

    def _replace(self, key: str, temporary: Path, path: Path) -> ObjectInfo:
        info = _info(key, temporary.stat())
        temporary.replace(path)
        _sync_folder(path.parent)
        return info

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self._temporary.mkdir(parents=True, exist_ok=True)
        place = self._temporary / "lock"
        try:
            opened = place.open("ab")
        except IsADirectoryError as error:
            raise StoreUnavailable(f"{place}: a folder where this store has its lock; remove it") from error
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
                    raise
                raise UnsafeStore(
                    f"{self.root}: this file system has no locks ({system_text(error)}); choose another folder, or "
                    "mount it with locks"
                ) from error
            yield

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn the operating system's errors into the store's."""
        try:
            yield
        except IsADirectoryError:
            raise NotFound(f"{key}: no object in {self.uri}, but something else that is no file", key=key) from None
        except FileNotFoundError:
            raise NotFound(f"{key}: no such object in {self.uri}", key=key) from None
        except PermissionError as error:
            raise AccessDenied(
                f"{key}: {system_text(error)} on {error.filename}; check the folder's owner and mode", key=key
            ) from error
        except OSError as error:
            raise _translate(self.root, key, error) from error


def _translate(root: Path, key: str, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{key}: no space left in {root}; nothing was written, free some and try again", key=key)
    if error.errno == errno.EROFS:
        return AccessDenied(f"{root} is on a read-only file system; name a store that can be written", key=key)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):  # the latter from mkdir; that of link is met where it is called
        return BadKey(f"{key}: part of it is an object in {root}; a key cannot be both object and folder", key=key)
    return StoreUnavailable(f"{key}: {system_text(error)} in {root}", key=key)


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    # Every write makes a new file, so inode and time of change name it; the digest would cost a read.
    return ObjectInfo(key, status.st_size, file_version(status), status.st_mtime)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
