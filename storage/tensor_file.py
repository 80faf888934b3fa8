"""safetensors files, written so that their bytes follow from their content alone, and read without believing a header.

The safetensors library leaves the order of its metadata open, and trusts what it maps. The format: eight bytes with the
header's length (little endian), the header (JSON), then the tensors without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.document import parse_json
from storage.errors import InvalidShard

MAX_HEADER_BYTES = 16 << 20
DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
}
DTYPES |= {"U64": "<u8", "I64": "<i8", "F64": "<f8"}
DTYPE_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


def save_tensors(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file whose bytes follow from its arguments alone.

    Tensors in the order given, metadata sorted.

    The format wants no alignment but the header's (8 bytes, padded with spaces).
    """
    arrays = {key: little_endian(key, tensor) for key, tensor in tensors.items()}
    # The shapes of the tensors themselves: numpy makes one of no dimension contiguous by giving it one.
    described = {key: (DTYPE_NAMES[array.dtype], tensors[key].shape) for key, array in arrays.items()}
    return b"".join([tensor_header(described, metadata), *(array.tobytes() for array in arrays.values())])


def tensor_header(described: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return what stands before the tensors of a file: its header's length and its header.

    Args:
        described: of each tensor, in the order of the file, the name of its dtype and its shape.
        metadata: as in `save_tensors`.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key, (dtype, shape) in described.items():
        stop = offset + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def little_endian(key: str, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the tensor contiguous and little endian; InvalidShard for a type that the format does not know."""
    if tensor.dtype.newbyteorder("<") not in DTYPE_NAMES:
        raise InvalidShard(f"tensor {key!r}: dtype {tensor.dtype} is none of {', '.join(DTYPES)}", key=key)
    return np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))


def load_tensors(source: bytes | memoryview | Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return the tensors (read-only views, in file order) and metadata of a safetensors file. Raises `InvalidShard`."""
    view = (_map(source) if isinstance(source, Path) else memoryview(source)).toreadonly()
    header_bytes = int.from_bytes(view[:8], "little")
    if len(view) < 8 or header_bytes > min(MAX_HEADER_BYTES, len(view) - 8):
        raise InvalidShard(
            f"shard: header of {header_bytes} bytes in a file of {len(view)}, at most {MAX_HEADER_BYTES} allowed"
        )
    header = json_object(bytes(view[8 : 8 + header_bytes]), "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidShard("shard: __metadata__ is not a map of strings")
    payload = view[8 + header_bytes :]
    tensors, offset = {}, 0
    for key, entry in header.items():
        tensors[key], offset = _tensor(key, entry, payload, offset)
    if offset != len(payload):
        raise InvalidShard(f"shard: {len(payload)} bytes of payload, its header accounts for {offset}")
    return tensors, metadata


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise InvalidShard(f"shard: {path.name} is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _tensor(key: str, entry: Any, payload: memoryview, offset: int) -> tuple[npt.NDArray[Any], int]:
    """Return a view of one tensor, which must begin where the one before ended, and where it ends."""
    whole = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if not whole or entry["dtype"] not in tuple(DTYPES):  # a tuple: what stands there need not be hashable
        raise InvalidShard(
            f"shard: tensor {key!r}: expected dtype (of {', '.join(DTYPES)}), shape, data_offsets", key=key
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        raise InvalidShard(
            f"shard: tensor {key!r}: shape {shape!r}, data_offsets {offsets!r} are not lists of sizes", key=key
        )
    dtype = np.dtype(DTYPES[entry["dtype"]])
    stop = offset + math.prod(shape) * dtype.itemsize
    if offsets != [offset, stop] or stop > len(payload):
        raise InvalidShard(
            f"shard: tensor {key!r}: data_offsets {offsets}, expected [{offset}, {stop}] within {len(payload)} bytes",
            key=key,
        )
    return np.frombuffer(payload[offset:stop], dtype=dtype).reshape(shape), stop


def json_object(raw: bytes | str, what: str) -> dict[str, Any]:
    """Parse a JSON object in which no key stands twice; ``what`` names it in the error."""
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise InvalidShard(f"shard: {what} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidShard(f"shard: {what} is not a JSON object")
    return value


def is_shape(value: Any) -> bool:
    """Tell whether a parsed value is a list of sizes that multiply to something sane."""
    return (
        isinstance(value, list)
        and len(value) <= 9
        and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
        and math.prod(filter(None, value)) < 1 << 60
    )
