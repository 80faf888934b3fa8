"""The file system as a boundary: whatever is raised while a user's file is read, or a temporary one written, becomes
one line with its name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StorageError
from workers.errors import CheckpointError, ScratchError, ScratchFull, WorkError, one_line, system_line

_NUMBER = re.compile(r"\(os error (\d+)\)")  # how the safetensors library, which is no Python, tells them


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever is raised while a checkpoint is read into one line.

    Args:
        name: what the user calls the file.

    Raises:
        CheckpointError: the file is at fault, or the machine; errors of ours and of a store pass as they are.

    """
    try:
        yield
    except (WorkError, StorageError):
        raise
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {name}: {system_line(error)}.") from error
    except MemoryError as error:
        raise CheckpointError(f"{name} does not fit into this machine's memory.") from error
    except Exception as error:
        raise CheckpointError(f"{name} cannot be read as a checkpoint: {one_line(error)}.") from error


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
        told = _NUMBER.search(one_line(error))
        if isinstance(error, OSError):
            raise ScratchError.of(folder, error) from error
        if told is not None:
            raise ScratchError.of(folder, OSError(int(told[1]), one_line(error))) from error
        raise ScratchError(f"The temporary folder {folder}: {one_line(error)}.") from error


def require_room(folder: Path, size_bytes: int, what: str) -> None:
    """Raise `ScratchFull` where a folder's disk has less room than is to be written to it: before it is written."""
    with writing(folder):
        free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise ScratchFull(
            f"{what} needs {size_bytes / 1e6:.1f} MB in the temporary folder {folder}, {free / 1e6:.1f} MB are free; "
            "free some, or set TMPDIR to a larger one."
        )
