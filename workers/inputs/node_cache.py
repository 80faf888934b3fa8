"""Image sets and checkpoints of a bucket, fetched once a node: a folder that one user's workers on a machine share.

    nestquant-inputs-<uid>/<sha256 of the URI>/object        the bytes
                                              /record.json   the ETag that they came with, and which file they are
                          <sha256 of the URI>.lock           held by whoever looks or downloads

A task asks the store for the object unless its ETag is the one at hand: one request, and a body only where it is new.
It gets a hard link in its own folder, so that what it reads stays whatever is removed here. A killed task leaves an
``object.partial``, which nobody reads and the next download replaces.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from storage.digest import file_version
from storage.stores.blob_store import Opened
from storage.stores.s3 import S3Store
from workers.inputs.writing import write_pieces, writing
from workers.scratch import temporary_folder

LIMIT_VARIABLE = "NESTQUANT_NODE_CACHE_BYTES"
DEFAULT_LIMIT_BYTES = 20_000_000_000
_SHARE_OF_DISK = 10
_log = logging.getLogger(__name__)


def node_cache() -> NodeCache | None:
    """Return this machine's cache in the temporary folder; None where the limit is 0 or the place is not ours.

    The limit is ``NESTQUANT_NODE_CACHE_BYTES``, by default 20 GB and at most a tenth of the disk.

    Raises:
        ScratchError: there is no temporary folder.
    """
    place = temporary_folder()
    text = os.environ.get(LIMIT_VARIABLE, "")
    if text and not text.isdigit():
        _log.warning("%s=%s is no number of bytes; the default is taken.", LIMIT_VARIABLE, text)
    with writing(place):
        default = min(DEFAULT_LIMIT_BYTES, shutil.disk_usage(place).total // _SHARE_OF_DISK)
    limit = int(text) if text.isdigit() else default
    folder = _folder(place)
    return NodeCache(folder, limit) if limit and _is_ours(folder) else None


def own_folder() -> Path:
    """Return the folder of this user's workers on this machine; a new one where somebody else took its name.

    Raises:
        ScratchError: there is no temporary folder.
    """
    folder = _folder(temporary_folder())
    return folder if _is_ours(folder) else Path(tempfile.mkdtemp(prefix="nestquant-inputs-"))


def _folder(place: Path) -> Path:
    return place / f"nestquant-inputs-{os.geteuid()}"


def _is_ours(folder: Path) -> bool:
    """Make the folder, or look at what is there: in a folder that all may write to, it may be somebody else's."""
    with writing(folder.parent), contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    if not ours:
        _log.warning("%s is not a folder of this user's alone; inputs are downloaded by every task.", folder)
    return ours


@dataclass(frozen=True)
class NodeCache:
    """The folder, and how many bytes it may hold."""

    folder: Path
    limit_bytes: int

    def place(self, uri: str, store: S3Store, target: Path) -> None:
        """Put what an s3:// URI names under ``target``, a new name: from here, or downloaded now.

        Raises:
            ScratchError: the folder cannot be written, or is full.
            storage.StorageError: the store refused.
        """
        name = hashlib.sha256(uri.encode()).hexdigest()
        entry = self.folder / name
        with self._lock(entry):
            with store.open_own(unless_etag=self._known_etag(entry)) as opened:
                if opened is not None and opened.size_bytes > self.limit_bytes:
                    write_pieces(opened.pieces, target)
                    return
                if opened is not None:
                    self._download(entry, opened)
            with writing(self.folder):
                os.utime(entry / "record.json")  # used now: the last to be removed
            _link(entry / "object", target)
        self.trim()

    def trim(self, limit_bytes: int | None = None) -> None:
        """Remove what was used longest ago until the folder holds no more than its limit; what is in use stays."""
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        entries = []
        for record in self.folder.glob("*/record.json"):
            with contextlib.suppress(OSError):  # another trims too
                used, size = record.stat().st_mtime_ns, (record.parent / "object").stat().st_size
                entries.append((used, size, record.parent))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= limit:
                return
            with contextlib.suppress(Timeout, OSError), _file_lock(entry, timeout_s=0):
                shutil.rmtree(entry)
                total -= size

    @contextmanager
    def _lock(self, entry: Path) -> Iterator[None]:
        lock = _file_lock(entry)
        with writing(self.folder):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _known_etag(self, entry: Path) -> str | None:
        """Return the ETag of the bytes at hand; None where there are none, or they are not those that were written."""
        try:
            record = json.loads((entry / "record.json").read_text())
            same = file_version((entry / "object").stat()) == record["version"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return str(record["etag"]) if same else None

    def _download(self, entry: Path, opened: Opened) -> None:
        record, file = entry / "record.json", entry / "object"
        with writing(self.folder):
            entry.mkdir(mode=0o700, exist_ok=True)
            record.unlink(missing_ok=True)  # from here on the bytes are nobody's until they are whole
            free = shutil.disk_usage(entry).free
        if opened.size_bytes > free:
            self.trim(0)
        write_pieces(opened.pieces, file)
        with writing(self.folder):
            file.chmod(0o400)
            version = file_version(file.stat())
        write_pieces([json.dumps({"etag": opened.etag, "version": version}).encode()], record)


def _file_lock(entry: Path, *, timeout_s: float = -1) -> BaseFileLock:
    """Return an entry's lock, which goes with its holder: where the file system has none, taking it fails."""
    return FileLock(f"{entry}.lock", timeout=timeout_s, mode=0o600, fallback_to_soft=False)


def _link(source: Path, target: Path) -> None:
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            shutil.copyfile(source, target)  # another disk, or one without links
