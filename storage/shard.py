"""The shard: one level of a group of layer pieces as a safetensors file with one codec.

A shard holds *integers*, one U8 payload of one dimension per piece, coded by the shard's codec, and *tensors* as they
are (scales, zero points). Its bytes follow from its content alone: entries stand in declared order, the header is
written here because the library leaves the order of its metadata open.

    packed   signed k-bit integers, packed by the caller: exactly ceil(N * k / 8) bytes
    zstd     one zstd frame per piece over one byte an integer

Names of layers are long, and a shard names each several times: so tensors are numbered, and ``index``, the first one,
is a zstd frame of the JSON that says what each number is (see docs/performance.md for what that saves).

Nothing that a header claims is believed: `read_shard` checks names, types, lengths and offsets before it touches a
payload, and a frame is decoded only where its declared size is the number of integers (safetensors format; RFC 8878,
3.1.1.1.4 for the frame content size).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zstandard

from storage.errors import InvalidShard
from storage.manifest import Codec, canonical_json

FORMAT = "nestquant.shard.v1"
FORMAT_BASE = "nestquant.base.v1"
MAX_HEADER_BYTES = 16 << 20
_INDEX = "index"
_INDEX_LEVEL = 19
_DTYPES = {
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
_DTYPES |= {"U64": "<u8", "I64": "<i8", "F64": "<f8"}
_DTYPE_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}

Int8Array = npt.NDArray[np.int8]
UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class IntegerTensor:
    """A piece's signed integers, twice.

    ``values`` int8 of ``shape``, and ``packed`` uint8 (ceil(N * bits / 8),) of the same integers.
    """

    values: Int8Array
    packed: UInt8Array
    bits: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """A shard's bytes, the codec chosen, and how many bytes its integers are once decoded (one each).

    ``payload_bytes``: what each piece's integers take in the shard.
    """

    data: bytes
    codec: Codec
    decoded_bytes: int
    payload_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StoredIntegers:
    """A piece's integers as stored: ``payload`` uint8 of one dimension, in the shard's codec."""

    bits: int
    shape: tuple[int, ...]
    payload: UInt8Array


@dataclass(frozen=True, slots=True)
class Shard:
    """A validated shard. Arrays are read-only views of the bytes that it was read from."""

    codec: Codec
    integers: Mapping[str, StoredIntegers]
    tensors: Mapping[str, npt.NDArray[Any]]

    def payload(self, key: str, *, count: int) -> Int8Array | UInt8Array:
        """Return the ``count`` integers of a piece.

        Int8 (count,) where the codec is zstd, else uint8, still packed as the caller packed them.

        Raises `InvalidShard` where there are none, not as many, or one of them does not fit its bits.
        """
        stored = self.integers.get(key)
        if stored is None or math.prod(stored.shape) != count:
            seen = "none" if stored is None else f"{stored.shape}"
            raise InvalidShard(f"shard: {count} integers expected under {key!r}, seen {seen}", key=key)
        if self.codec == "packed":
            return stored.payload
        values = np.frombuffer(_decode_frame(key, stored.payload, count), dtype=np.int8)
        bound = 1 << (stored.bits - 1)
        if values.size and (int(values.min()) < -bound or int(values.max()) >= bound):
            raise InvalidShard(f"shard: {key!r} holds integers beyond {stored.bits} signed bits", key=key)
        return values

    def tensor(self, key: str) -> npt.NDArray[Any]:
        """Return a copy of a tensor that stands beside the integers. Raises `InvalidShard` where there is none."""
        if key not in self.tensors:
            raise InvalidShard(f"shard: no tensor {key!r} in it", key=key)
        return self.tensors[key].copy()


def build_shard(integers: Mapping[str, IntegerTensor], tensors: Mapping[str, npt.NDArray[Any]]) -> EncodedShard:
    """Return the shard of these integers and tensors in the codec that makes it smaller (packed on a tie)."""
    for key, tensor in integers.items():
        _check_integers(key, tensor)
    compressor = zstandard.ZstdCompressor(compression_params=_frame_parameters())
    frames = {
        key: compressor.compress(np.ascontiguousarray(tensor.values).tobytes()) for key, tensor in integers.items()
    }
    packed_bytes = sum(tensor.packed.size for tensor in integers.values())
    codec: Codec = "zstd" if sum(map(len, frames.values())) < packed_bytes else "packed"
    payloads = {
        key: np.frombuffer(frames[key], np.uint8) if codec == "zstd" else tensor.packed
        for key, tensor in integers.items()
    }
    described = [[key, tensor.bits, *tensor.shape] for key, tensor in integers.items()]
    index = canonical_json({"integers": described, "tensors": list(tensors)})
    numbered = {str(number): tensor for number, tensor in enumerate([*payloads.values(), *tensors.values()])}
    frame = np.frombuffer(zstandard.ZstdCompressor(level=_INDEX_LEVEL).compress(index), np.uint8)
    data = save_tensors({_INDEX: frame, **numbered}, {"codec": codec, "format": FORMAT})
    decoded_bytes = sum(tensor.values.size for tensor in integers.values())
    return EncodedShard(data, codec, decoded_bytes, {key: payload.nbytes for key, payload in payloads.items()})


def save_tensors(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file whose bytes follow from its arguments alone.

    Tensors in the order given, metadata sorted.

    The format wants no alignment but the header's (8 bytes, padded with spaces).
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset, chunks = 0, []
    for key, tensor in tensors.items():
        if tensor.dtype.newbyteorder("<") not in _DTYPE_NAMES:
            raise InvalidShard(f"tensor {key!r}: dtype {tensor.dtype} is none of {', '.join(_DTYPES)}", key=key)
        little = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
        name = _DTYPE_NAMES[little.dtype]
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [offset, offset + little.nbytes]}
        chunks.append(little.tobytes())
        offset += little.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


def read_shard(source: bytes | memoryview | Path) -> Shard:
    """Return the shard in ``source``, validated; a path is mapped, not read. Raises `InvalidShard`."""
    tensors, metadata = load_tensors(source)
    if metadata.get("format") != FORMAT:
        raise InvalidShard(f"shard: format {metadata.get('format')!r}, expected {FORMAT!r}")
    if set(metadata) != {"format", "codec"} or metadata["codec"] not in ("packed", "zstd"):
        raise InvalidShard(
            f"shard: metadata {sorted(metadata)} with codec {metadata.get('codec')!r}, expected packed or zstd"
        )
    codec = cast("Codec", metadata["codec"])
    described, names = _read_index(tensors)
    payloads = [tensors[str(number)] for number in range(len(described))]
    integers = {
        key: _stored(key, value, codec, payload)
        for (key, value), payload in zip(described.items(), payloads, strict=True)
    }
    beside = {name: tensors[str(len(described) + number)] for number, name in enumerate(names)}
    return Shard(codec, integers, beside)


def _read_index(tensors: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, list[int]], list[str]]:
    """Return what the numbered tensors are: integers by key with ``[bits, *shape]``, then the names of the others."""
    frame = tensors.get(_INDEX)
    if frame is None or frame.dtype != np.uint8 or frame.ndim != 1:
        raise InvalidShard("shard: no index, a U8 tensor of one dimension")
    size = _frame_size(_INDEX, frame)
    if not 0 < size <= MAX_HEADER_BYTES:
        raise InvalidShard(f"shard: an index of {size} bytes, at most {MAX_HEADER_BYTES} allowed")
    document = _json_object(_decode_frame(_INDEX, frame, size), "index")
    described, names = document.get("integers"), document.get("tensors")
    whole = set(document) == {"integers", "tensors"} and isinstance(described, list) and isinstance(names, list)
    if not whole or not all(isinstance(one, list) and one and isinstance(one[0], str) for one in described or ()):
        raise InvalidShard("shard: the index is not {integers: [[key, bits, *shape], ...], tensors: [name, ...]}")
    assert described is not None and names is not None  # noqa: PT018 - for the type checker; checked above
    integers = {one[0]: one[1:] for one in described}
    strings = all(isinstance(name, str) for name in names)
    if not strings or len({*integers, *names}) != len(described) + len(names):
        raise InvalidShard("shard: a name in the index is no string, or stands twice")
    expected = [_INDEX, *(str(number) for number in range(len(described) + len(names)))]
    if list(tensors) != expected:
        raise InvalidShard(f"shard: {len(tensors) - 1} tensors, its index names {len(expected) - 1}, in order")
    return integers, names


def build_base(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the base blob: float parameters under their state dict's names, in the order given."""
    return save_tensors(tensors, {"format": FORMAT_BASE})


def read_base(source: bytes | memoryview | Path) -> dict[str, npt.NDArray[Any]]:
    """Return copies of a base blob's tensors. Raises `InvalidShard`."""
    tensors, metadata = load_tensors(source)
    if metadata != {"format": FORMAT_BASE}:
        raise InvalidShard(f"base: metadata {metadata}, expected format {FORMAT_BASE!r}")
    return {key: tensor.copy() for key, tensor in tensors.items()}


def load_tensors(source: bytes | memoryview | Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return the tensors (read-only views, in file order) and metadata of a safetensors file. Raises `InvalidShard`."""
    view = (_map(source) if isinstance(source, Path) else memoryview(source)).toreadonly()
    header_bytes = int.from_bytes(view[:8], "little")
    if len(view) < 8 or header_bytes > min(MAX_HEADER_BYTES, len(view) - 8):
        raise InvalidShard(
            f"shard: header of {header_bytes} bytes in a file of {len(view)}, at most {MAX_HEADER_BYTES} allowed"
        )
    header = _json_object(bytes(view[8 : 8 + header_bytes]), "header")
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
    if not whole or entry["dtype"] not in tuple(_DTYPES):  # a tuple: what stands there need not be hashable
        raise InvalidShard(
            f"shard: tensor {key!r}: expected dtype (of {', '.join(_DTYPES)}), shape, data_offsets", key=key
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_shape(shape) or not _is_shape(offsets) or len(offsets) != 2:
        raise InvalidShard(
            f"shard: tensor {key!r}: shape {shape!r}, data_offsets {offsets!r} are not lists of sizes", key=key
        )
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    stop = offset + math.prod(shape) * dtype.itemsize
    if offsets != [offset, stop] or stop > len(payload):
        raise InvalidShard(
            f"shard: tensor {key!r}: data_offsets {offsets}, expected [{offset}, {stop}] within {len(payload)} bytes",
            key=key,
        )
    return np.frombuffer(payload[offset:stop], dtype=dtype).reshape(shape), stop


def _stored(key: str, value: Any, codec: Codec, payload: npt.NDArray[Any]) -> StoredIntegers:
    if not _is_shape(value) or len(value) < 2 or not 1 <= value[0] <= 8:
        raise InvalidShard(f"shard: integers {key!r}: {value!r} is not [bits, *shape]", key=key)
    if payload.dtype != np.uint8 or payload.ndim != 1:
        raise InvalidShard(f"shard: integers {key!r}: expected a U8 tensor of one dimension", key=key)
    stored = StoredIntegers(value[0], tuple(value[1:]), payload)
    expected = -(-math.prod(stored.shape) * stored.bits // 8)
    if codec == "packed" and payload.size != expected:
        raise InvalidShard(f"shard: integers {key!r}: {payload.size} bytes packed, expected {expected}", key=key)
    if codec == "zstd":
        _check_frame(key, stored)
    return stored


def _check_frame(key: str, stored: StoredIntegers) -> None:
    claimed, expected = _frame_size(key, stored.payload), math.prod(stored.shape)
    if claimed != expected:
        raise InvalidShard(f"shard: integers {key!r}: a zstd frame of {claimed} bytes, expected {expected}", key=key)


def _frame_size(key: str, frame: npt.NDArray[Any]) -> int:
    """Return what a frame says its content is long; -1 where it does not say."""
    try:
        return int(zstandard.get_frame_parameters(frame.tobytes()).content_size)
    except zstandard.ZstdError as error:
        raise InvalidShard(f"shard: integers {key!r}: not a zstd frame ({error})", key=key) from error


def _decode_frame(key: str, frame: npt.NDArray[Any], size: int) -> bytes:
    """Return the content of a frame, which must be ``size`` bytes; no more than that is ever allocated."""
    try:
        data = zstandard.ZstdDecompressor().decompress(frame.tobytes(), max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InvalidShard(f"shard: integers {key!r}: the zstd frame does not decode ({error})", key=key) from error
    if len(data) != size:
        raise InvalidShard(f"shard: integers {key!r}: {len(data)} bytes decoded, expected {size}", key=key)
    return data


def _check_integers(key: str, tensor: IntegerTensor) -> None:
    expected = -(-tensor.values.size * tensor.bits // 8)
    if (
        tensor.values.dtype != np.int8
        or tensor.packed.dtype != np.uint8
        or not tensor.shape
        or tensor.values.shape != tensor.shape
    ):
        raise InvalidShard(
            f"integers {key!r}: {tensor.values.dtype} {tensor.shape}, packed {tensor.packed.dtype}, not int8, uint8",
            key=key,
        )
    if not 1 <= tensor.bits <= 8 or tensor.packed.shape != (expected,):
        raise InvalidShard(
            f"integers {key!r}: packed {tensor.packed.shape} at {tensor.bits} bits, expected ({expected},)", key=key
        )


def _frame_parameters() -> zstandard.ZstdCompressionParameters:
    """Return what suits quantized weights: few and long matches, so that nearly all is left to the Huffman code.

    Short matches cost more than the literals they replace (docs/adr/0003-shard-codec.md has the measurements).
    """
    return zstandard.ZstdCompressionParameters.from_level(
        1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, write_content_size=1
    )


def _json_object(raw: bytes | str, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InvalidShard(f"shard: {what} is not JSON ({str(error)[:120]})") from error
    if not isinstance(value, dict):
        raise InvalidShard(f"shard: {what} is not a JSON object")
    return value


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 9
        and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
        and math.prod(filter(None, value)) < 1 << 60
    )
