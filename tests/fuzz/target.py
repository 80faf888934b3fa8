"""What is fuzzed: everything that a device parses. Anything but a ``StorageError`` is a crash."""

from __future__ import annotations

import math

from storage.device.resolve import parse_release
from storage.errors import StorageError
from storage.shard import read_base, read_shard
from storage.tensor_file import load_tensors


def one_line(error: object) -> None:
    """What a user is shown fits one line."""
    assert "\n" not in str(error), error


def read_everything(data: bytes) -> None:
    """Read ``data`` as a shard, with every payload, and as a base; only a ``StorageError`` is an answer."""
    try:
        shard = read_shard(data)
        for key, stored in shard.integers.items():
            count = math.prod(stored.shape)
            if count <= 1 << 20:
                shard.payload(key, count=count)
    except StorageError as error:
        one_line(error)
    for read in (read_base, load_tensors):
        try:
            read(data)
        except StorageError as error:
            one_line(error)


def one_input(data: bytes) -> None:
    """Parse one input the way its first byte says: a shard, or a manifest."""
    if data[:1] < b"\x80":
        read_everything(data[1:])
        return
    try:
        parse_release(data[1:], "net", 1, signed=False)
    except StorageError as error:
        one_line(error)
