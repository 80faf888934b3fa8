"""SHA-256 of our own over every blob and manifest.

What a store or a network says about its bytes is never taken on trust.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from storage.errors import BadKey, Corrupt

Data = bytes | bytearray | memoryview

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_bytes(data: Data) -> str:
    """Return ``sha256:<64 hex>`` of the bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_file(path: Path) -> str:
    """Return ``sha256:<64 hex>`` of a file, read block by block."""
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def file_version(status: os.stat_result) -> str:
    """Return what tells a file from one written later under its name: inode, time of change and length.

    Two writes within one tick of the file system's clock (some milliseconds) may look like one.
    """
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def digest_pieces(pieces: Iterable[bytes]) -> tuple[str, int]:
    """Return ``sha256:<64 hex>`` and the length in bytes of what comes piece by piece."""
    hasher, size_bytes = hashlib.sha256(), 0
    for piece in pieces:
        hasher.update(piece)
        size_bytes += len(piece)
    return f"sha256:{hasher.hexdigest()}", size_bytes


def digest_hex(digest: str) -> str:
    """Return the 64 hex digits of a digest, or raise `BadKey` where it is none."""
    if not _DIGEST.fullmatch(digest):
        raise BadKey(f"digest {digest!r}: expected 'sha256:' and 64 lower-case hex digits")
    return digest.removeprefix("sha256:")


def verify_bytes(key: str, data: Data, *, digest: str, size_bytes: int) -> None:
    """Raise `Corrupt` unless ``data`` has this length in bytes and this digest."""
    if len(data) != size_bytes:
        raise Corrupt(key, expected=f"{size_bytes} bytes", seen=f"{len(data)} bytes")
    actual = digest_bytes(data)
    if actual != digest:
        raise Corrupt(key, expected=digest, seen=actual)
