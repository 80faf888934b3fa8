"""What is fuzzed: everything that a device parses. Anything but a ``StorageError`` is a crash."""

from __future__ import annotations

import math

from storage.device.resolve import parse_release
from storage.errors import StorageError
from storage.shard import read_base, read_shard
from storage.tensor_file import load_tensors
from tests.fuzz.trusted import ROLES, bench, one_line, read_metadata, read_state, read_trusted

# The first byte of an input, from here on:
MANIFEST, STATE, SERVED, KEPT_ONES = 0x80, 0xA0, 0xC0, 0xE0


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
    """Parse one input the way its first byte says: a shard, a manifest, a state, metadata served or kept."""
    kind, rest = data[0] if data else 0, data[1:]
    if kind < MANIFEST:
        read_everything(rest)
    elif kind < STATE:
        try:
            parse_release(rest, "net", 1, signed=False)
        except StorageError as error:
            one_line(error)
    elif kind < SERVED:
        read_state(rest)
    elif kind < KEPT_ONES:
        read_metadata(ROLES[kind % 4], rest, sign_it=kind % 8 >= 4)
    else:
        names = list(bench().kept)
        read_trusted(names[kind % len(names)], rest)
