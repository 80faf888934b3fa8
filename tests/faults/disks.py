"""A disk with no byte left."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path


def fill(folder: Path) -> Path:
    """Take every byte that the file system of ``folder`` has left; return the file that holds them."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    if free := shutil.disk_usage(folder).free:
        raise AssertionError(f"{free} bytes are left in {folder}")
    return filler
