"""The shard: one level of a group of layer pieces as a safetensors file with one codec.

A shard holds *integers*, a payload per piece, coded by the shard's codec, and *tensors* as they are (scales, ...).

    packed   signed k-bit integers, packed by the caller: exactly ceil(N * k / 8) bytes
    zstd     one zstd frame per piece over one byte an integer

The file has three U8 tensors: ``index``, a zstd frame of the JSON that says what the others hold; ``integers``, the
payloads one after the other; ``tensors``, one zstd frame of the byte planes of each tensor. A safetensors entry for
each part would cost more than its scales do (docs/performance.md). The bytes follow from the content alone: the header
is written here because the library leaves the order of its metadata open.

Nothing that a header claims is believed: `read_shard` checks names, types, lengths and offsets before it touches a
payload, and a frame is decoded only where its declared size is the number of integers (safetensors format; RFC 8878,
3.1.1.1.4 for the frame content size).

The *canonical form* of a shard is the same file without compression: index, integers (one byte each, or packed as they
are) and byte planes as they were before zstd. No compressor's version can change it, so it is what the result of a
delta is verified against (docs/adr/0034-deltas.md), and it is read like the shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zstandard

from storage.errors import InvalidShard
from storage.manifest import Codec, canonical_json
from storage.tensor_file import (
    DTYPE_NAMES,
    DTYPES,
    MAX_HEADER_BYTES,
    is_shape,
    json_object,
    little_endian,
    load_tensors,
    save_tensors,
    tensor_header,
)

FORMAT = "nestquant.shard.v1"
FORMAT_CANONICAL = "nestquant.shard.canonical.v1"
FORMAT_BASE = "nestquant.base.v1"
_BLOCK_BYTES = 1 << 18
_SECTIONS = ("index", "integers", "tensors")
_SMALL_LEVEL = 19
MAX_TENSORS_BYTES = 256 << 20
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
    """A validated shard. Arrays are read-only views of the bytes that it was read from.

    ``plain``: read from the canonical form, so that integers of the codec zstd stand there one byte each.
    """

    codec: Codec
    integers: Mapping[str, StoredIntegers]
    tensors: Mapping[str, npt.NDArray[Any]]
    plain: bool = False

    def payload(self, key: str, *, count: int) -> Int8Array | UInt8Array:
        """Return the ``count`` integers of a piece.

        Int8 (count,) where the codec is zstd, else uint8, still packed as the caller packed them.

        Raises `InvalidShard` where there are none, not as many, or one of them does not fit its bits.
        """
        stored = self.integers.get(key)
        if stored is None or math.prod(stored.shape) != count:
            actual = "none" if stored is None else f"{stored.shape}"
            raise InvalidShard(f"shard: {count} integers expected under {key!r}, seen {actual}", key=key)
        if self.codec == "packed":
            return stored.payload
        raw = stored.payload if self.plain else _decode_frame(key, stored.payload, count)
        values = np.frombuffer(raw, dtype=np.int8)
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
    stored = {key: StoredIntegers(tensor.bits, tensor.shape, payloads[key]) for key, tensor in integers.items()}
    little = {name: little_endian(name, tensor) for name, tensor in tensors.items()}
    decoded_bytes = sum(tensor.values.size for tensor in integers.values())
    payload_bytes = {key: payload.nbytes for key, payload in payloads.items()}
    return EncodedShard(_assemble(codec, stored, little), codec, decoded_bytes, payload_bytes)


def _assemble(codec: Codec, integers: Mapping[str, StoredIntegers], tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the file of payloads that are coded already, and of tensors as they are."""
    frame = _compress(_index(integers, tensors))
    beside = _compress(b"".join(map(_byte_planes, tensors.values())))
    payloads = [stored.payload.data for stored in integers.values()]
    header = _header((len(frame), sum(map(len, payloads)), len(beside)), codec, FORMAT)
    return b"".join([header, frame, *payloads, beside])


def _header(lengths: tuple[int, int, int], codec: Codec, form: str) -> bytes:
    sections = {name: ("U8", (length,)) for name, length in zip(_SECTIONS, lengths, strict=True)}
    return tensor_header(sections, {"codec": codec, "format": form})


def _index(integers: Mapping[str, StoredIntegers], tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    index = {
        "integers": [[key, stored.payload.nbytes, stored.bits, *stored.shape] for key, stored in integers.items()],
        "tensors": [[name, DTYPE_NAMES[tensor.dtype], *tensor.shape] for name, tensor in tensors.items()],
    }
    return canonical_json(index)


def canonical_form(shard: Shard) -> tuple[int, Iterator[bytes]]:
    """Return length and bytes of a shard's canonical form, piece by piece; integers are decoded as they are asked for.

    Raises `InvalidShard` from the pieces.
    """
    plain = shard.plain or shard.codec == "packed"
    sizes = {key: one.payload.nbytes if plain else math.prod(one.shape) for key, one in shard.integers.items()}
    # Of the payloads that the index describes, the lengths alone are looked at: no memory is behind them.
    unread = np.broadcast_to(np.uint8(0), (max(sizes.values(), default=0),))
    described = {key: StoredIntegers(one.bits, one.shape, unread[: sizes[key]]) for key, one in shard.integers.items()}
    index = _index(described, shard.tensors)
    planes = b"".join(map(_byte_planes, shard.tensors.values()))
    lengths = (len(index), sum(sizes.values()), len(planes))
    header = _header(lengths, shard.codec, FORMAT_CANONICAL)

    def pieces() -> Iterator[bytes]:
        yield header + index
        for key, one in shard.integers.items():
            yield from (one.payload.tobytes(),) if plain else _decoded_blocks(key, one.payload, sizes[key])
        yield planes

    return len(header) + sum(lengths), pieces()


def shard_from_canonical(data: bytes | memoryview) -> bytes:
    """Return the shard that `build_shard` made of the same content, as this machine's zstd compresses it.

    Raises `InvalidShard` where ``data`` is no canonical form.
    """
    shard = read_shard(data)
    if not shard.plain:
        raise InvalidShard(f"shard: format {FORMAT!r}, expected {FORMAT_CANONICAL!r}")
    integers = dict(shard.integers)
    if shard.codec == "zstd":
        compressor = zstandard.ZstdCompressor(compression_params=_frame_parameters())
        for key, one in integers.items():
            frame = np.frombuffer(compressor.compress(one.payload.data), np.uint8)
            integers[key] = StoredIntegers(one.bits, one.shape, frame)
    return _assemble(shard.codec, integers, shard.tensors)


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_SMALL_LEVEL).compress(data)


def _byte_planes(tensor: npt.NDArray[Any]) -> bytes:
    """Return all first bytes, then all second ones, ...: neighbours' exponents are alike, their mantissas are not."""
    return tensor.reshape(-1, 1).view(np.uint8).T.tobytes()


def read_shard(source: bytes | memoryview | Path) -> Shard:
    """Return the shard in ``source``, validated; a path is mapped, not read. Raises `InvalidShard`."""
    tensors, metadata = load_tensors(source)
    plain = metadata.get("format") == FORMAT_CANONICAL
    if not plain and metadata.get("format") != FORMAT:
        raise InvalidShard(f"shard: format {metadata.get('format')!r}, expected {FORMAT!r}")
    if set(metadata) != {"format", "codec"} or metadata["codec"] not in ("packed", "zstd"):
        raise InvalidShard(
            f"shard: metadata {sorted(metadata)} with codec {metadata.get('codec')!r}, expected packed or zstd"
        )
    codec = cast("Codec", metadata["codec"])
    index = _read_index(tensors, plain=plain)
    integers = _cut_integers(index["integers"], tensors["integers"], codec, plain=plain)
    return Shard(codec, integers, _cut_tensors(index["tensors"], tensors["tensors"], plain=plain), plain)


def _read_index(tensors: Mapping[str, npt.NDArray[Any]], *, plain: bool) -> dict[str, list[list[Any]]]:
    """Return what the two other sections hold, names checked, sizes not yet."""
    if tuple(tensors) != _SECTIONS or any(one.dtype != np.uint8 or one.ndim != 1 for one in tensors.values()):
        raise InvalidShard(f"shard: tensors {list(tensors)[:4]}, expected {list(_SECTIONS)}, each U8 of one dimension")
    size = tensors["index"].size if plain else _frame_size("index", tensors["index"])
    if not 0 < size <= MAX_HEADER_BYTES:
        raise InvalidShard(f"shard: an index of {size} bytes, at most {MAX_HEADER_BYTES} allowed")
    text = tensors["index"].tobytes() if plain else _decode_frame("index", tensors["index"], size)
    index = json_object(text, "index")
    rows = [row for part in ("integers", "tensors") for row in _list(index.get(part))]
    if set(index) != {"integers", "tensors"} or not all(isinstance(row, list) and len(row) > 1 for row in rows):
        raise InvalidShard("shard: the index is not {integers: [[key, bytes, bits, *shape]], tensors: [[name, ...]]}")
    names = [row[0] for row in rows]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise InvalidShard("shard: a name in the index is no string, or stands twice")
    return index


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _cut_integers(
    rows: list[list[Any]], section: npt.NDArray[Any], codec: Codec, *, plain: bool
) -> dict[str, StoredIntegers]:
    integers, offset = {}, 0
    for key, *described in rows:
        if not is_shape(described) or len(described) < 3:
            raise InvalidShard(f"shard: integers {key!r}: {described!r} is not [bytes, bits, *shape]", key=key)
        size, *value = described
        if offset + size > section.size:
            raise InvalidShard(f"shard: integers {key!r}: {size} bytes, {section.size - offset} left", key=key)
        integers[key] = _stored(key, value, codec, section[offset : offset + size], plain=plain)
        offset += size
    if offset != section.size:
        raise InvalidShard(f"shard: {section.size} bytes of integers, the index accounts for {offset}")
    return integers


def _cut_tensors(rows: list[list[Any]], section: npt.NDArray[Any], *, plain: bool) -> dict[str, npt.NDArray[Any]]:
    sizes = {}
    for key, dtype, *shape in rows:
        if dtype not in tuple(DTYPES) or not is_shape(shape):  # a tuple: what stands there need not be hashable
            raise InvalidShard(f"shard: tensor {key!r}: {dtype!r} {shape!r} is not a dtype and a shape", key=key)
        sizes[key] = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    expected = sum(sizes.values())
    claimed = section.size if plain else _frame_size("tensors", section)
    if claimed != expected or expected > MAX_TENSORS_BYTES:
        raise InvalidShard(
            f"shard: {claimed} bytes of tensors, the index accounts for {expected}, at most {MAX_TENSORS_BYTES} allowed"
        )
    planes = section if plain else np.frombuffer(_decode_frame("tensors", section, expected), np.uint8)
    tensors, offset = {}, 0
    for key, dtype, *shape in rows:
        part = planes[offset : offset + sizes[key]].reshape(np.dtype(DTYPES[dtype]).itemsize, -1)
        tensors[key] = np.ascontiguousarray(part.T).view(DTYPES[dtype]).reshape(shape)
        offset += sizes[key]
    return tensors


def build_base(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the base blob: float parameters under their state dict's names, in the order given."""
    return save_tensors(tensors, {"format": FORMAT_BASE})


def read_base(source: bytes | memoryview | Path) -> dict[str, npt.NDArray[Any]]:
    """Return copies of a base blob's tensors. Raises `InvalidShard`."""
    tensors, metadata = load_tensors(source)
    if metadata != {"format": FORMAT_BASE}:
        raise InvalidShard(f"base: metadata {metadata}, expected format {FORMAT_BASE!r}")
    return {key: tensor.copy() for key, tensor in tensors.items()}


def _stored(key: str, value: list[Any], codec: Codec, payload: npt.NDArray[Any], *, plain: bool) -> StoredIntegers:
    if not 1 <= value[0] <= 8:
        raise InvalidShard(f"shard: integers {key!r}: {value!r} is not [bits, *shape]", key=key)
    stored = StoredIntegers(value[0], tuple(value[1:]), payload)
    expected = -(-math.prod(stored.shape) * stored.bits // 8)
    if codec == "packed" and payload.size != expected:
        raise InvalidShard(f"shard: integers {key!r}: {payload.size} bytes packed, expected {expected}", key=key)
    if codec == "zstd" and not plain:
        _check_frame(key, stored)
    if codec == "zstd" and plain and payload.size != math.prod(stored.shape):
        raise InvalidShard(f"shard: integers {key!r}: {payload.size} bytes plain, expected {stored.shape}", key=key)
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


def _decoded_blocks(key: str, frame: npt.NDArray[Any], size: int) -> Iterator[bytes]:
    """Yield the content of a frame, which must be ``size`` bytes, block by block."""
    count = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(frame.data) as reader:
            while block := reader.read(_BLOCK_BYTES):
                count += len(block)
                yield block
    except zstandard.ZstdError as error:
        raise InvalidShard(f"shard: integers {key!r}: the zstd frame does not decode ({error})", key=key) from error
    if count != size:
        raise InvalidShard(f"shard: integers {key!r}: {count} bytes decoded, expected {size}", key=key)


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
