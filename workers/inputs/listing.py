"""The files of an image set: what a folder or an archive lists, and regular files alone opened."""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
import tarfile
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

from nestquant.engines.images import ImageFault
from workers.errors import DataError, one_line
from workers.inputs.labels import Listing, is_image, is_junk


def list_folder(path: Path, uri: str) -> Listing:
    """Walk through a folder as ImageFolder does, links to folders included; a link to a folder that it lies in is left
    out.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{uri}: a folder cannot be read: {one_line(error)}.") from error

    images: list[str] = []
    folders: list[str] = []
    others: list[str] = []
    above: dict[str, frozenset[tuple[int, int]]] = {str(path): frozenset({_place(path)})}
    for place, inner, files in os.walk(path, followlinks=True, onerror=refuse):
        parents = above.pop(place)
        prefix = Path(place).relative_to(path).as_posix().removeprefix(".")
        prefix = f"{prefix}/" if prefix else ""
        subfolders = []
        for name in inner:
            identity = _place(Path(place, name))
            if not is_junk(name) and identity not in parents:
                above[os.path.join(place, name)] = parents | {identity}
                subfolders.append(name)
        inner[:] = subfolders
        folders += [prefix + name for name in subfolders]
        for name in files:
            if not is_junk(name):
                (images if is_image(name) else others).append(prefix + name)
    return Listing(frozenset(images), folders, others)


def list_archive(members: Mapping[str, tarfile.TarInfo]) -> Listing:
    """List an archive; a link counts as what it leads to."""
    names = [name for name in members if name != "." and not is_junk(name)]
    files = [name for name in names if members[name].isfile() or members[name].islnk() or members[name].issym()]
    folders: set[str] = set()
    for name in names:
        folder = name if members[name].isdir() else posixpath.dirname(name)
        while folder and folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    images = frozenset(name for name in files if is_image(name))
    return Listing(images, folders, [name for name in files if name not in images])


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; a pipe would be waited for without end.

    Raises:
        ImageFault: it is something else.
    """
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ImageFault("not a regular file")
    return stream


def file_digest(path: Path) -> bytes:
    """Return the SHA-256 of a regular file's bytes; raises as ``open_file`` does."""
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _place(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
