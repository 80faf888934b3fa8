"""Opening what lies under a name that somebody else may have put there: a regular file, or a refusal, never a wait."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from storage.digest import digest_bytes
from storage.errors import Damaged


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: as ``open`` does; a folder, a pipe, a socket or a device is ``IsADirectoryError``. (Opening a pipe
            would wait for its writer, a device may never end: open(2), O_NONBLOCK.)
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise IsADirectoryError(errno.EISDIR, "not a regular file", str(path)) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_verified(path: Path, *, digest: str, size_bytes: int) -> bytes:
    """Read a whole file and return its bytes, which are those of the digest: hashed as read, opened once.

    Raises:
        Damaged: the bytes are others; the message names the file, what was expected and what was seen.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(size_bytes + 1)
    if len(data) != size_bytes:
        longer = f"more than {size_bytes}" if len(data) > size_bytes else str(len(data))
        raise Damaged(f"{path}: {longer} bytes, expected {size_bytes}", key=digest)
    actual = digest_bytes(data)
    if actual != digest:
        raise Damaged(f"{path}: its SHA-256 is {actual}, expected {digest}", key=digest)
    return data
