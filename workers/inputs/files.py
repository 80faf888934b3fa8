"""Users' files, here or in a store, and the file system as a boundary: whatever is raised while one is read, or a
temporary one written, becomes one line with its name.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage.errors import StorageError
from storage.stores.blob_store import is_key
from storage.stores.s3 import S3Store
from storage.stores.uri import open_store
from workers.errors import CheckpointError, DataError, ScratchFull, WorkError, one_line, system_line
from workers.inputs.node_cache import node_cache
from workers.inputs.writing import write_pieces, writing


@dataclass(frozen=True)
class InputKind:
    """What a user's file is: its word in messages, and what they say where it is missing."""

    word: str
    read_as: str
    error: type[WorkError]
    absent: str

    def missing(self, uri: str) -> WorkError:
        """Return the error of a file that is not there."""
        return self.error(self.absent.format(uri=uri))


CHECKPOINT = InputKind(
    "checkpoint", "a checkpoint", CheckpointError, "No file at {uri}: expected a local path or an s3:// URI."
)
IMAGES = InputKind(
    "image set",
    "an image set",
    DataError,
    "No images at {uri}: there is no such file or folder. Give a folder, a .tar or an .npz, or an s3:// URI of one.",
)
LABELS = InputKind(
    "file of labels",
    "a file of labels",
    DataError,
    "No labels at {uri}: there is no such file. Give a text file with one name a line, or an s3:// URI of one.",
)


def local_path(uri: str) -> Path:
    """Return the path that a plain path or file:///path names, ``~`` as the home folder."""
    return Path(uri.removeprefix("file://")).expanduser()


def fetch(uri: str, folder: Path, kind: InputKind = CHECKPOINT) -> Path:
    """Return a local path for a checkpoint or an image set: the path itself, or what an s3:// URI names, downloaded.

    What ``stored_file`` names is downloaded from any store; what a bucket holds, once for all tasks of this machine
    (``workers.inputs.node_cache``). What the folder holds of a URI already is not downloaded
    again: all that a job does with it sees the same bytes.

    Args:
        uri: a path, file:///path, s3://bucket/path/to/file, or what ``stored_file`` returned.
        folder: where downloads go, a folder of each URI's own.
        kind: what it is, for errors.

    Raises:
        CheckpointError, DataError: there is no such file.
        ScratchError: the folder cannot be written, or is full.
        storage.StorageError: the store refused.

    """
    store_uri, mark, key = uri.rpartition("#")
    place = folder / hashlib.sha256(uri.encode()).hexdigest()[:16]
    if mark and "://" in store_uri and is_key(key) and not Path(uri.removeprefix("file://")).exists():
        path = place / key.rpartition("/")[2]
        if not path.exists():
            write_pieces(open_store(store_uri).stream(key), path)
        return path
    if not uri.startswith("s3://"):
        with reading(uri, kind):
            path = local_path(uri)
            if not path.exists():
                raise kind.missing(uri)
            return path.resolve()
    store = open_store(uri)
    if not isinstance(store, S3Store) or not store.prefix:
        raise kind.error(f"{uri} names a bucket; expected s3://bucket/path/to/file.")
    path, cache = place / Path(store.prefix.rstrip("/")).name, node_cache()
    if path.exists():
        return path
    if cache is not None:
        cache.place(uri, store, path)
        return path
    with store.open_own() as opened:
        assert opened is not None, "asked without an ETag"
        write_pieces(opened.pieces, path)
    return path


def stored_file(store_uri: str, key: str) -> str:
    """Return a URI that ``fetch`` reads: an object of a store that is no bucket of plain files (no URI has a ``#``)."""
    return f"{store_uri}#{key}"


@contextmanager
def reading(name: str, kind: InputKind = CHECKPOINT) -> Iterator[None]:
    """Turn whatever is raised while a user's file is read into one line.

    Args:
        name: what the user calls the file.
        kind: what it is.

    Raises:
        CheckpointError, DataError: the file is at fault, or the machine; errors of ours and of a store pass as they
            are.

    """
    try:
        yield
    except (WorkError, StorageError):
        raise
    except OSError as error:
        raise kind.error(f"Cannot read the {kind.word} {name}: {system_line(error)}.") from error
    except MemoryError as error:
        raise kind.error(f"{name} does not fit into this machine's memory.") from error
    except Exception as error:
        raise kind.error(f"{name} cannot be read as {kind.read_as}: {one_line(error)}.") from error


def require_room(folder: Path, size_bytes: int, what: str) -> None:
    """Raise `ScratchFull` where a folder's disk has less room than is to be written to it: before it is written."""
    with writing(folder):
        free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise ScratchFull(
            f"{what} needs {size_bytes / 1e6:.1f} MB in the temporary folder {folder}, {free / 1e6:.1f} MB are free; "
            "free some, or set TMPDIR to a larger one."
        )
