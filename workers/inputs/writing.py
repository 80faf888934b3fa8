"""Writing temporary files: the file system as a boundary, whatever is raised there becomes one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StorageError
from workers.errors import ScratchError, WorkError, one_line

_NUMBER = re.compile(r"\(os error (\d+)\)")  # how the safetensors library, which is no Python, tells them


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says while a file in the temporary folder is written into one line.

    Raises:
        ScratchFull: there is no room left.
        ScratchError: it cannot be written for another reason.

    """
    try:
        yield
    except (WorkError, StorageError):
        raise
    except Exception as error:
        number = _NUMBER.search(one_line(error))
        if isinstance(error, OSError):
            raise ScratchError.of(folder, error) from error
        if number is not None:
            raise ScratchError.of(folder, OSError(int(number[1]), one_line(error))) from error
        raise ScratchError(f"The temporary folder {folder}: {one_line(error)}.") from error


def write_pieces(pieces: Iterable[bytes], path: Path) -> None:
    """Write what comes piece by piece; under its name only when it is whole. The folder is made.

    Raises:
        ScratchError: it cannot be written; what ``pieces`` raises passes as it is.
    """
    partial, folder = path.with_name(f"{path.name}.partial"), path.parent
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = partial.open("wb")
    try:
        for piece in pieces:  # what a store raises is the store's
            with writing(folder):
                file.write(piece)
    finally:
        with writing(folder):
            file.close()
    with writing(folder):
        partial.replace(path)
