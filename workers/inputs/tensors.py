"""Tensors read one at a time, or some rows of one, from a safetensors file on disk or in a store.

The layout is that of the safetensors format: eight bytes with the header's length (little endian), the header (JSON),
the data without holes or overlaps. Every value that is read is looked at (`workers.inputs.values`), and a file that is
not the one that was opened any more is refused.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import torch

from storage.digest import file_version
from storage.layout import is_blob_key
from storage.stores.uri import open_store
from storage.tensor_file import is_shape
from workers.errors import CheckpointError, one_line, printable
from workers.inputs.files import reading
from workers.inputs.values import check_values
from workers.inputs.writing import writing
from workers.tasks import TensorSource

HEADER_CAP_BYTES = 100_000_000  # the format's own cap
# A request to a store costs some 10 to 50 ms, in which a worker's link moves a few hundred kB: smaller gaps are read
# along, and no merged read grows beyond MERGED_BYTES, but a tensor may.
GAP_BYTES = 64 * 1024
MERGED_BYTES = 8 << 20
_PIECE_BYTES = 4 << 20  # a multiple of every element's size

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
class TensorInfo:
    """One tensor of the file; ``start`` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class _Ranges(Protocol):
    def read(self, start: int, length: int) -> bytes: ...


class _File:
    """A file that must stay the one that it is now: every read asks."""

    def __init__(self, source: TensorSource) -> None:
        self.path, self.source = Path(source.key), source
        with reading(str(source)):
            status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{source} is no file; expected a checkpoint (.safetensors, .pth or .pt).")
        self.version, self.size_bytes = file_version(status), status.st_size
        if source.version not in (None, self.version):
            raise self.changed()

    def read(self, start: int, length: int) -> bytes:
        with self.opened() as stream:
            stream.seek(start)
            return stream.read(length)

    @contextmanager
    def opened(self) -> Iterator[BufferedReader]:
        """Yield the open file; raise where it was written to meanwhile, or is another one."""
        with reading(str(self.source)), self.path.open("rb") as stream:
            self._check(stream)
            yield stream
            self._check(stream)

    def _check(self, stream: BufferedReader) -> None:
        if file_version(os.fstat(stream.fileno())) != self.version:
            raise self.changed()

    def changed(self) -> CheckpointError:
        """Return what is raised where the file is not the one that was opened."""
        return CheckpointError(f"{self.source} was written to while it was read; wait for its writer and run again.")


class _Stored:
    def __init__(self, uri: str, key: str) -> None:
        self.store, self.key = open_store(uri), key

    def read(self, start: int, length: int) -> bytes:
        return self.store.get_range(self.key, start, length) if length else b""


class _Extent:
    """Planned reads that lie close together: ``first:last`` in the file, read at once and held until all are served."""

    def __init__(self, first: int) -> None:
        self.first, self.last = first, first
        self.waiting = 0
        self.data: bytes | None = None

    def add(self, start: int, length: int) -> None:
        self.last = max(self.last, start + length)
        self.waiting += 1


class _Merged:
    """Answers the reads that were planned from fewer, longer ones; others go through as they are."""

    def __init__(self, ranges: _Ranges, planned: Iterable[tuple[int, int]]) -> None:
        self.ranges = ranges
        self.extents: dict[tuple[int, int], _Extent] = {}
        extent: _Extent | None = None
        for start, length in sorted(planned):
            stop = start + length
            if extent is None or start > extent.last + GAP_BYTES or stop > extent.first + MERGED_BYTES:
                extent = _Extent(start)
            extent.add(start, length)
            self.extents[start, length] = extent

    def read(self, start: int, length: int) -> bytes:
        extent = self.extents.get((start, length))
        if extent is None or length == extent.last - extent.first or not extent.waiting:
            return self.ranges.read(start, length)
        if extent.data is None:
            extent.data = self.ranges.read(extent.first, extent.last - extent.first)
        data = extent.data[start - extent.first : start - extent.first + length]
        extent.waiting -= 1
        if not extent.waiting:
            extent.data = None
        return data


class TensorReader:
    """Reads the header once, then each tensor with one ranged read, or several with one (``planned``)."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self._file = _File(source) if source.store is None else None
        self._ranges: _Ranges = self._file or _Stored(str(source.store), source.key)
        with reading(str(source)):  # whatever a header that is not one leads to
            self.tensors, self.metadata = self._header()

    def _header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        try:
            prefix = self._ranges.read(0, 8)
            length = struct.unpack("<Q", prefix)[0]
            if not 2 <= length <= HEADER_CAP_BYTES:
                raise CheckpointError(
                    f"{self.source} is not a safetensors file (header length {length}); expected .safetensors, .pth "
                    "or .pt."
                )
            header = self._ranges.read(8, length)
            if len(header) < length:
                raise CheckpointError(
                    f"{self.source} is cut short: its header takes {length} bytes, {len(header)} are there; copy it "
                    "anew."
                )
            document = json.loads(header)
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
            raise CheckpointError(
                f"{self.source} is not a safetensors file ({one_line(error)}); expected .safetensors, .pth or .pt."
            ) from error
        end = base
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size_bytes)):
            self._check(name, info)
            if info.start != end:
                raise CheckpointError(
                    f"{self.source}: tensor {name!r} begins at byte {info.start}, expected {end}; copy the file anew."
                )
            end += info.size_bytes
        if self._file is not None and self._file.size_bytes != end:
            more = "is cut short" if self._file.size_bytes < end else "holds more than its header names"
            raise CheckpointError(
                f"{self.source} {more}: {self._file.size_bytes} bytes, its header accounts for {end}; copy it anew."
            )
        return tensors, metadata

    def _check(self, name: str, info: TensorInfo) -> None:
        if not all(map(is_shape, (list(info.shape), [info.start], [info.size_bytes]))):
            raise CheckpointError(
                f"{self.source}: tensor {name!r} has no shape of sizes: {printable(str(info.shape))}."
            )
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
        return self._tensor(info, (stop - start, *info.shape[1:]), *self._span(name, start, stop), name)

    @property
    def pinned(self) -> TensorSource:
        """Return the source with the version that was opened: whoever reads another one is told."""
        return self.source if self._file is None else replace(self.source, version=self._file.version)

    def checked_digest(self) -> str:
        """Return ``sha256:<hex>`` of the whole file, every tensor's values looked at on the way: one pass, a few MB in
        memory.

        Raises:
            CheckpointError: values that no network computes with; the file was written to meanwhile.

        """
        assert self._file is not None, "a stored file was checked by whoever stored it"
        hasher = hashlib.sha256()
        tensors = sorted(self.tensors.items(), key=lambda item: item[1].start)
        with self._file.opened() as stream:
            hasher.update(stream.read(tensors[0][1].start if tensors else self._file.size_bytes))
            for name, info in tensors:
                for start in range(0, info.size_bytes, _PIECE_BYTES):
                    piece = bytearray(min(_PIECE_BYTES, info.size_bytes - start))
                    if stream.readinto(piece) != len(piece):
                        raise self._file.changed()
                    hasher.update(piece)
                    check_values(str(self.source), name, torch.frombuffer(piece, dtype=DTYPES[info.dtype]))
        return f"sha256:{hasher.hexdigest()}"

    def copied(self, tensors: Mapping[str, TensorInfo], path: Path) -> Path:
        """Write some of the file's tensors under other names as a new file, a few MB in memory; return its path."""
        assert self._file is not None
        header: dict[str, object] = {}
        ordered, offset = sorted(tensors.items(), key=lambda item: item[1].start), 0
        for name, info in ordered:
            span = [offset, offset + info.size_bytes]
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
            offset = span[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        spans = [
            (info.start + start, min(_PIECE_BYTES, info.size_bytes - start))
            for _, info in ordered
            for start in range(0, info.size_bytes, _PIECE_BYTES)
        ]
        with self._file.opened() as stream, writing(path.parent), path.open("wb") as copied:
            copied.write(struct.pack("<Q", len(text)) + text)
            for start, length in spans:
                with reading(str(self.source)):
                    stream.seek(start)
                    piece = stream.read(length)
                copied.write(piece)
        return path

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where the file is not the one any more that was opened."""
        if self._file is not None:
            with self._file.opened():
                pass

    def planned(self, reads: Iterable[tuple[str, int | None, int | None]]) -> TensorReader:
        """Return a reader for these reads to come, of ``(name, start row, stop row)`` or ``(name, None, None)`` for a
        whole tensor: neighbours in the file come with one request, and are held until each was read once.
        """
        reader = copy.copy(self)
        reader._ranges = _Merged(self._ranges, (self._span(*span) for span in reads))
        return reader

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Return the names in the order in which their tensors lie in the file."""
        return sorted(names, key=lambda name: self.tensors[name].start)

    def _span(self, name: str, start: int | None, stop: int | None) -> tuple[int, int]:
        info = self.tensors[name]
        if start is None or stop is None:
            return info.start, info.size_bytes
        row = info.size_bytes // info.shape[0]
        return info.start + start * row, (stop - start) * row

    def _tensor(self, info: TensorInfo, shape: tuple[int, ...], start: int, size: int, name: str) -> torch.Tensor:
        data = self._ranges.read(start, size)
        if len(data) != size:
            raise CheckpointError(
                f"{self.source}: tensor {name!r} ends after {len(data)} of {size} bytes: the file is cut short."
            )
        if size == 0:
            return torch.zeros(shape, dtype=DTYPES[info.dtype])
        tensor = torch.frombuffer(bytearray(data), dtype=DTYPES[info.dtype]).reshape(shape)
        check_values(str(self.source), name, tensor)
        return tensor


def open_tensors(source: TensorSource) -> TensorReader:
    """Return the reader of a source; a worker that serves many tasks reads the header of one file once."""
    return _reader(source, _version(source))


@functools.lru_cache(maxsize=4)
def _reader(source: TensorSource, _: str) -> TensorReader:
    """Keyed by what the file is, not by its name alone: a file written again has another header."""
    return TensorReader(source)


def _version(source: TensorSource) -> str:
    if source.store is not None:
        return source.key if is_blob_key(source.key) else open_store(source.store).head(source.key).etag
    try:
        return file_version(os.stat(source.key))
    except OSError:
        return ""  # opening it says what is wrong
