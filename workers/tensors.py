"""Tensors read one at a time, or some rows of one, from a safetensors file on disk or in a store.

The layout is that of the safetensors format: eight bytes with the header's length (little endian), the header (JSON),
the data.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from storage.uri import open_store
from workers.errors import CheckpointError

HEADER_CAP_BYTES = 100_000_000  # the format's own cap

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSource:
    """Where a checkpoint's safetensors file lies: a path on this machine (``store`` is None), or a key in a store.

    Small and picklable.
    """

    store: str | None
    key: str

    def __str__(self) -> str:
        return self.key if self.store is None else f"{self.store} {self.key}"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file; ``start`` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class _Ranges(Protocol):
    def read(self, start: int, length: int) -> bytes: ...


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, start: int, length: int) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)


class _Stored:
    def __init__(self, uri: str, key: str) -> None:
        self.store, self.key = open_store(uri), key

    def read(self, start: int, length: int) -> bytes:
        return self.store.get_range(self.key, start, length) if length else b""


class TensorReader:
    """Reads the header once, then each tensor with one ranged read."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self._ranges: _Ranges = _File(Path(source.key)) if source.store is None else _Stored(source.store, source.key)
        self.tensors, self.metadata = self._header()

    def _header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        try:
            prefix = self._ranges.read(0, 8)
            length = struct.unpack("<Q", prefix)[0]
            if not 2 <= length <= HEADER_CAP_BYTES:
                raise ValueError(f"header length {length}")
            document = json.loads(self._ranges.read(8, length))
            metadata = document.pop("__metadata__", {})
            base = 8 + length
            tensors = {
                name: TensorInfo(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    base + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in document.items()
            }
        except OSError as error:
            raise CheckpointError(f"Cannot read the checkpoint {self.source}: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise CheckpointError(
                f"{self.source} is not a safetensors file ({error}); expected .safetensors, .pth or .pt."
            ) from error
        for name, info in tensors.items():
            self._check(name, info)
        return tensors, metadata

    def _check(self, name: str, info: TensorInfo) -> None:
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.source}: tensor {name!r} has dtype {info.dtype}; expected one of {', '.join(DTYPES)}."
            )
        expected = math.prod(info.shape) * DTYPES[info.dtype].itemsize
        if info.size_bytes != expected:
            raise CheckpointError(
                f"{self.source}: tensor {name!r} holds {info.size_bytes} bytes; shape {info.shape} needs {expected}."
            )

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor ``name`` in its own dtype and shape, owning its memory."""
        info = self.tensors[name]
        return self._tensor(info, info.shape, info.start, info.size_bytes, name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start:stop`` along axis 0: only their bytes are read."""
        info = self.tensors[name]
        row = info.size_bytes // info.shape[0]
        return self._tensor(info, (stop - start, *info.shape[1:]), info.start + start * row, (stop - start) * row, name)

    def _tensor(self, info: TensorInfo, shape: tuple[int, ...], start: int, size: int, name: str) -> torch.Tensor:
        data = self._ranges.read(start, size)
        if len(data) != size:
            raise CheckpointError(
                f"{self.source}: tensor {name!r} ends after {len(data)} of {size} bytes: the file is cut short."
            )
        if size == 0:
            return torch.zeros(shape, dtype=DTYPES[info.dtype])
        return torch.frombuffer(bytearray(data), dtype=DTYPES[info.dtype]).reshape(shape)


@functools.lru_cache(maxsize=4)
def open_tensors(source: TensorSource) -> TensorReader:
    """Return the reader of a source; a worker that serves many tasks reads the header once."""
    return TensorReader(source)
