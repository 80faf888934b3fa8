"""The error tree is the one drawn, survives a process boundary, and the package exports what it says."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import pytest

from storage import errors
from storage.errors import Corrupt, StorageError, TooLarge


def every_error() -> list[type[StorageError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StorageError)]
    return [value for value in found if value is not StorageError]


def test_the_drawn_tree_is_the_real_one() -> None:
    assert errors.__doc__
    drawn = re.findall(r"^    (│?\s*)[├└]── (\w+)  ", errors.__doc__, re.MULTILINE)
    parents: dict[str, str] = {}
    last = ""
    for indent, name in drawn:
        parents[name] = last if indent else "StorageError"
        last = last if indent else name
    assert parents == {error.__name__: error.__bases__[0].__name__ for error in every_error()}


@pytest.mark.parametrize(
    "error",
    [
        Corrupt("blobs/x", expected="sha256:a", seen="sha256:b"),
        TooLarge("blobs/x", limit_bytes=1, seen_bytes=2),
        *(kind("message", key="k") for kind in every_error() if kind not in (Corrupt, TooLarge)),
    ],
)
def test_errors_cross_processes_whole(error: StorageError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
    assert back.key


def test_messages() -> None:
    assert str(Corrupt("blobs/x", expected="5 bytes", seen="4 bytes")) == (
        "blobs/x: expected 5 bytes, seen 4 bytes; fetch it again, and if it stays so, run 'nestquant fsck'"
    )
    assert str(TooLarge("k", limit_bytes=4, seen_bytes=5)) == "k: 5 bytes, at most 4 expected; nothing was read"


def test_the_package_needs_no_heavy_import() -> None:
    names = "{name.partition('.')[0] for name in sys.modules}"
    code = f"import sys, storage, storage.stores.doctor, storage.retention; print(*{names})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "zstandard", "safetensors", "boto3", "botocore", "torch", "ray"} & set(loaded)
    assert "pydantic" in loaded
