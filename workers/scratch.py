"""Folders for a while, and what killed processes left of them.

Whoever makes a folder holds a lock on it for as long as it lives, however it dies: the next start removes those that
nobody holds. A folder is ours by its exact name, its owner, and a mark that was put in it after it was locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from workers.errors import ScratchError, system_line

Kind = Literal[
    "analyze", "calibrate", "equalize", "evaluate", "export", "job", "measure", "reconstruct", "sensitivity", "weights"
]

MARK = "nestquant-scratch"
_MARK_TEXT = b"A folder of a nestquant process. It is removed by the next one that finds it unlocked.\n"
_NAME = re.compile(rf"nestquant-({'|'.join(get_args(Kind))})-[a-z0-9_]{{8}}")  # as tempfile.mkdtemp makes them
_EMPTY_AGE_S = 3600.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """What was removed: folders, and the bytes of the files in them."""

    folders: int
    freed_bytes: int


@contextmanager
def scratch(kind: Kind, *, parent: str | None = None, tell: Callable[[str], None] = _log.info) -> Iterator[Path]:
    """Yield a new folder that only this user can read, gone with all that is in it afterwards.

    First, what killed processes left beside it is removed.

    Args:
        kind: whose folder it is; part of its name.
        parent: where to make it; None takes the temporary folder (``TMPDIR``).
        tell: hears in one line what was removed.

    Raises:
        ScratchError: there is no temporary folder, or nothing can be written in it.
    """
    place = Path(parent) if parent is not None else temporary_folder()
    swept = sweep(place)
    if swept.folders:
        freed = f"{swept.freed_bytes / 1e6:.1f} MB freed"
        tell(f"Removed {swept.folders} folders that killed jobs left in {place}: {freed}.")
    try:
        folder, descriptor = _make(place, kind)
    except OSError as error:
        raise ScratchError.of(place, error) from error
    try:
        yield folder
    finally:
        _remove(place, folder.name, descriptor)
        os.close(descriptor)


def _make(place: Path, kind: Kind) -> tuple[Path, int]:
    folder = Path(tempfile.mkdtemp(prefix=f"nestquant-{kind}-", dir=place))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _mark(descriptor)
    except OSError:
        _remove(place, folder.name, descriptor)
        os.close(descriptor)
        raise
    return folder, descriptor


def temporary_folder() -> Path:
    """Return the temporary folder: what ``TMPDIR`` (or ``TEMP``, ``TMP``) names, else the system's.

    Raises:
        ScratchError: it is not there, or cannot be written. Python would take another one without a word.

    """
    for variable in ("TMPDIR", "TEMP", "TMP"):
        path = os.environ.get(variable)
        if not path:
            continue
        place = Path(path).absolute()
        if not place.is_dir():
            raise ScratchError(f"{variable}={path}: no such folder; make it, or name another one.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ScratchError(f"{variable}={path} cannot be written; name another folder.")
        return place
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise ScratchError(f"{system_line(error)}; set TMPDIR to a folder with room for the weights.") from error


def sweep(place: Path) -> Swept:
    """Remove the folders in ``place`` that nobody holds any more.

    Links are never followed, and what has another name, another owner or no mark stays.
    """
    folders = freed_bytes = 0
    try:
        names = [entry.name for entry in os.scandir(place) if _NAME.fullmatch(entry.name)]
    except OSError:  # whoever writes there is told
        return Swept(0, 0)
    for name in names:
        try:
            descriptor = os.open(place / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # a link or a file; or its owner was first
            continue
        try:
            freed = _sweep_one(place, name, descriptor)
        except OSError:  # held, or no lock to be had; or something in it is not ours to remove
            continue
        finally:
            os.close(descriptor)
        if freed is not None:
            folders, freed_bytes = folders + 1, freed_bytes + freed
    return Swept(folders, freed_bytes)


def _sweep_one(place: Path, name: str, descriptor: int) -> int | None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        return None
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not _is_marked(descriptor):
        # Its owner was killed before it wrote anything, or is about to begin.
        if time.time() - status.st_mtime > _EMPTY_AGE_S:
            os.rmdir(place / name)  # fails where it is not empty
        return None
    size = _size_bytes(descriptor)
    return size if _remove(place, name, descriptor) else None


def _mark(descriptor: int) -> None:
    """Lock the folder, then mark it; where the file system has no locks it stays unmarked, and is never swept."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    mark = os.open(MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=descriptor)
    try:
        os.write(mark, _MARK_TEXT)
    finally:
        os.close(mark)


def _is_marked(descriptor: int) -> bool:
    try:
        mark = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(mark).st_mode) and os.read(mark, len(_MARK_TEXT) + 1) == _MARK_TEXT
    finally:
        os.close(mark)


def _size_bytes(descriptor: int) -> int:
    total = 0
    for _, _, files, at in os.fwalk(dir_fd=descriptor):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.stat(file, dir_fd=at, follow_symlinks=False).st_size
    return total


def _remove(place: Path, name: str, descriptor: int) -> bool:
    """Remove an open folder and what is in it, the mark last: what is left of a removal that was killed is found again.

    Return whether it is gone.
    """
    try:
        for entry in os.listdir(descriptor):
            if entry == MARK:
                continue
            if stat.S_ISDIR(os.stat(entry, dir_fd=descriptor, follow_symlinks=False).st_mode):
                shutil.rmtree(entry, dir_fd=descriptor)
            else:
                os.unlink(entry, dir_fd=descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(MARK, dir_fd=descriptor)
        os.rmdir(place / name)
    except OSError:
        return False
    return True
