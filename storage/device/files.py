"""Files of a cache: read whole and bounded, replaced in one step, and never through a link that somebody left there.

Folders are made 0755 and files 0644, less what the umask takes away: under a umask of 0 no other user of the machine
can write to a cache, and under one of 077 it stays private.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.device.errors import FULL, CacheError, NoSpace, NotOurs
from storage.wording import system_text

FOLDER_MODE, FILE_MODE = 0o755, 0o644
# A link is an error of open itself, and a pipe that somebody put there must not make it wait.
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an ``OSError`` of the device's disk into one line that names the file and what to try."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(
                f"{what}: {system_text(error)}; free space, downgrade or remove a model, then run again"
            ) from error
        raise CacheError(f"{what}: {system_text(error)}") from error


def is_file(path: Path) -> bool:
    """Tell whether there is a file, itself and not a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def check_file(path: Path) -> None:
    """Raise ``NotOurs`` where something else stands under the name of a file of ours."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        raise NotOurs(f"{path}: a {_what(mode)} where a cache has a file; remove it and try again")


def check_folder(root: Path, folder: Path) -> None:
    """Raise ``NotOurs`` where a link or file stands in the place of a folder between ``root`` and ``folder``."""
    below = folder.relative_to(root)
    for path in [*reversed(below.parents), below][1:]:
        try:
            mode = os.lstat(root / path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            raise NotOurs(f"{root / path}: a {_what(mode)} where a cache has a folder; remove it and try again")


def make_folder(root: Path, folder: Path) -> None:
    """Create a folder below a root that is there, each entered in its parent for good."""
    check_folder(root, folder)
    if not folder.is_dir():
        make_folder(root, folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(FOLDER_MODE)
        flush(folder.parent)


def read_file(path: Path, *, max_bytes: int) -> bytes:
    """Return the first ``max_bytes`` of a file: more than a right one has. Raises ``OSError``, ``NotOurs``."""
    check_file(path)
    with os.fdopen(os.open(path, os.O_RDONLY | _CAREFUL | _BINARY), "rb") as file:
        return file.read(max_bytes)


def open_file(path: Path) -> BinaryIO:
    """Open a file to read and write, unbuffered, made where it is not there.

    Raises ``OSError``; ``NotOurs`` for a link, also a hard one: what is written would be in another file, too.
    """
    check_file(path)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | _CAREFUL | _BINARY, FILE_MODE), "r+b", buffering=0)
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise NotOurs(f"{path}: a second name of another file where a cache has its own; remove it and try again")
    return file


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader, and a run after a power cut, sees the old bytes or the new.

    Raises ``OSError``, ``NotOurs``.
    """
    temporary = path.with_name(f"{path.name}.new")
    check_file(path)
    check_file(temporary)
    temporary.unlink(missing_ok=True)  # of a run that was killed
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFUL | _BINARY, FILE_MODE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk (POSIX; a no-op where folders cannot be opened)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _what(mode: int) -> str:
    kinds = {stat.S_IFLNK: "link", stat.S_IFDIR: "folder", stat.S_IFREG: "file", stat.S_IFIFO: "pipe"}
    return kinds.get(stat.S_IFMT(mode), "device")
