"""The shard: exact bytes, what the library reads, and a corpus of hostile files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from nestquant.packing import pack, unpack
from storage.errors import InvalidShard
from storage.shard import IntegerTensor, build_base, build_shard, read_base, read_shard
from storage.tensor_file import MAX_HEADER_BYTES, load_tensors, save_tensors
from tests.storage.artifacts import integers


def packed_tensor(values: list[int], bits: int) -> IntegerTensor:
    array = np.array([values], np.int8)
    return IntegerTensor(array, pack(array, bits), bits, array.shape)


def test_golden_bytes() -> None:
    encoded = build_shard(
        {"a[0:1]/level0": packed_tensor([-8, 7, 1, -1], 4)}, {"a[0:1]/scale": np.array([0.5], np.float32)}
    )
    document = b'{"integers":[["a[0:1]/level0",2,4,1,4]],"tensors":[["a[0:1]/scale","F32",1]]}'
    index = zstandard.ZstdCompressor(level=19).compress(document)
    scale = zstandard.ZstdCompressor(level=19).compress(b"\x00\x00\x00\x3f")
    end = len(index)
    header = (
        '{"__metadata__":{"codec":"packed","format":"nestquant.shard.v1"},'
        f'"index":{{"dtype":"U8","shape":[{end}],"data_offsets":[0,{end}]}},'
        f'"integers":{{"dtype":"U8","shape":[2],"data_offsets":[{end},{end + 2}]}},'
        f'"tensors":{{"dtype":"U8","shape":[{len(scale)}],"data_offsets":[{end + 2},{end + 2 + len(scale)}]}}}}'
    ).encode()
    padded = header + b" " * (-len(header) % 8)
    payload = index + bytes([0x78, 0xF1]) + scale
    assert encoded.data == len(padded).to_bytes(8, "little") + padded + payload
    assert (encoded.codec, encoded.decoded_bytes, encoded.payload_bytes) == ("packed", 4, {"a[0:1]/level0": 2})


def test_the_smaller_codec_is_chosen() -> None:
    skewed = np.zeros((64, 64), np.int8)
    skewed[0, 0] = 7
    assert build_shard({"a": IntegerTensor(skewed, pack(skewed, 4), 4, skewed.shape)}, {}).codec == "zstd"
    flat = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(np.int8)
    encoded = build_shard({"a": IntegerTensor(flat, pack(flat, 4), 4, flat.shape)}, {})
    assert encoded.codec == "packed"
    assert read_shard(encoded.data).payload("a", count=4096).size == 2048


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (8, 4, 3, 3), (7, 5), (3, 0, 2)])
def test_round_trip(bits: int, shape: tuple[int, ...]) -> None:
    pieces = {f"layer{number}": integers(shape, bits, number) for number in range(3)}
    scale = np.linspace(0, 1, 5, dtype=np.float16)
    encoded = build_shard(pieces, {"layer0/scale": scale})
    assert encoded.decoded_bytes == 3 * math.prod(shape)
    shard = read_shard(encoded.data)
    for key, piece in pieces.items():
        payload = shard.payload(key, count=math.prod(shape))
        values = payload.reshape(shape) if shard.codec == "zstd" else unpack(payload.view(np.uint8), bits, shape)
        np.testing.assert_array_equal(values, piece.values)
        assert (shard.integers[key].bits, shard.integers[key].shape) == (bits, shape)
    np.testing.assert_array_equal(shard.tensor("layer0/scale"), scale)
    assert shard.tensor("layer0/scale").dtype == np.float16


def test_size_is_within_two_hundredths_of_the_order_0_entropy() -> None:
    piece = integers((256, 1024), 8, 1)
    encoded = build_shard({"a": piece}, {})
    _, counts = np.unique(piece.values, return_counts=True)
    share = counts / counts.sum()
    entropy_bytes = -(share * np.log2(share)).sum() * piece.values.size / 8
    assert encoded.codec == "zstd"
    assert entropy_bytes < len(encoded.data) < 1.02 * entropy_bytes


def test_same_content_same_bytes_and_declared_order() -> None:
    pieces = {key: integers((4, 4), 4, 1) for key in ("b", "a")}
    data = build_shard(pieces, {}).data
    assert data == build_shard(pieces, {}).data
    assert data != build_shard(dict(sorted(pieces.items())), {}).data
    assert list(read_shard(data).integers) == ["b", "a"]
    assert list(load_tensors(data)[0]) == ["index", "integers", "tensors"]


def test_the_library_reads_the_same(tmp_path: Path) -> None:
    encoded = build_shard({"a[0:8]/level0": integers((8, 4, 3, 3), 4, 1)}, {"a[0:8]/scale": np.ones(8, np.float32)})
    path = tmp_path / "shard.safetensors"
    path.write_bytes(encoded.data)
    tensors, metadata = load_tensors(path)
    with safe_open(path, "numpy") as file:
        assert sorted(file.keys()) == sorted(tensors)
        assert file.metadata() == metadata
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(key), tensor)


def test_base_round_trip(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "bn.weight": np.arange(4, dtype=np.float32),
        "bn.num_batches_tracked": np.array(7, np.int64),
        "mask": np.array([True, False]),
        "big_endian": np.arange(3, dtype=">f4"),
        "strided": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    }
    path = tmp_path / "base.safetensors"
    path.write_bytes(build_base(tensors))
    back = read_base(path)
    assert list(back) == list(tensors)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor)
        assert back[key].flags.writeable
    with pytest.raises(InvalidShard, match=r"base: metadata .* expected format 'nestquant.base.v1'"):
        read_base(build_shard({}, {}).data)
    with pytest.raises(InvalidShard, match=r"format 'nestquant.base.v1', expected 'nestquant.shard.v1'"):
        read_shard(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (IntegerTensor(np.zeros((2, 2), np.int16), np.zeros(2, np.uint8), 4, (2, 2)), "int16"),
        (
            IntegerTensor(np.zeros((2, 2), np.int8), np.zeros(3, np.uint8), 4, (2, 2)),
            r"packed \(3,\) at 4 bits, expected \(2,\)",
        ),
        (IntegerTensor(np.zeros((2, 2), np.int8), np.zeros(2, np.uint8), 4, (4,)), "int8"),
        (IntegerTensor(np.zeros((2, 2), np.int8), np.zeros(5, np.uint8), 9, (2, 2)), "at 9 bits"),
    ],
)
def test_builder_refuses_what_does_not_fit(tensor: IntegerTensor, message: str) -> None:
    with pytest.raises(InvalidShard, match=message):
        build_shard({"a": tensor}, {})


def test_builder_refuses_unknown_types() -> None:
    with pytest.raises(InvalidShard, match="tensor 'a': dtype complex64"):
        save_tensors({"a": np.zeros(1, np.complex64)}, {})


def file_of(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(dtype: object = "U8", shape: object = (2,), offsets: object = (0, 2)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE_FILES = {
    "empty": b"",
    "shorter than a header length": b"\x00" * 7,
    "header beyond the end": (100).to_bytes(8, "little") + b"{}",
    "header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + b"{}",
    "header over the limit": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" + b" " * (MAX_HEADER_BYTES + 8),
    "not JSON": file_of(b"{]"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "not an object": file_of([]),
    "deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "huge number": file_of(b'{"a":' + b"9" * 10_000 + b"}"),
    "key twice": file_of(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "entry no object": file_of({"a": 1}),
    "entry with more": file_of({"a": entry() | {"x": 1}}, b"xx"),
    "unknown type": file_of({"a": entry("F99")}, b"xx"),
    "type no string": file_of({"a": entry(["U8"])}, b"xx"),
    "negative shape": file_of({"a": entry(shape=[-2])}, b"xx"),
    "fractional shape": file_of({"a": entry(shape=[2.0])}, b"xx"),
    "boolean shape": file_of({"a": entry(shape=[True, 2])}, b"xx"),
    "shape no list": file_of({"a": entry(shape="2")}, b"xx"),
    "shape of 2^48": file_of({"a": entry(shape=[1 << 48])}, b"xx"),
    "shape overflows": file_of({"a": entry(shape=[1 << 40, 1 << 40, 1 << 40])}, b"xx"),
    "empty, of 2^141 rows": file_of({"a": entry(shape=[1 << 47, 1 << 47, 1 << 47, 0], offsets=[0, 0])}),
    "many dimensions": file_of({"a": entry(shape=[1] * 10 + [2])}, b"xx"),
    "offsets beyond the end": file_of({"a": entry(shape=[99], offsets=[0, 99])}, b"xx"),
    "offsets do not fit the shape": file_of({"a": entry(offsets=[0, 1])}, b"x"),
    "offsets backwards": file_of({"a": entry(offsets=[2, 0])}, b"xx"),
    "offsets of three": file_of({"a": entry(offsets=[0, 2, 4])}, b"xx"),
    "hole": file_of({"a": entry(), "b": entry(offsets=[3, 5])}, b"xxxxx"),
    "overlap": file_of({"a": entry(), "b": entry(offsets=[1, 3])}, b"xxx"),
    "bytes left over": file_of({"a": entry()}, b"xxx"),
    "metadata no map": file_of({"__metadata__": []}),
    "metadata no strings": file_of({"__metadata__": {"format": 1}}),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_files_are_refused(name: str) -> None:
    with pytest.raises(InvalidShard):
        load_tensors(HOSTILE_FILES[name])


def shard_of(bits: object, shape: list[object], payload: bytes, *, codec: str = "zstd") -> bytes:
    return indexed({"integers": [["a", len(payload), bits, *shape]], "tensors": []}, payload, codec=codec)


def indexed(index: object, payload: bytes = b"", **metadata: str) -> bytes:
    """Return a shard with this index over these integers."""
    sections = {
        "index": zstandard.compress(json.dumps(index).encode()),
        "integers": payload,
        "tensors": zstandard.compress(b""),
    }
    tensors = {name: np.frombuffer(raw, np.uint8) for name, raw in sections.items()}
    return save_tensors(tensors, {"codec": "zstd", "format": "nestquant.shard.v1"} | metadata)


def frame(data: bytes, *, write_content_size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=write_content_size).compress(data)


HOSTILE_SHARDS: dict[str, Callable[[], bytes]] = {
    "bomb: a frame of 64 MiB for 4 integers": lambda: shard_of(4, [2, 2], frame(bytes(64 << 20))),
    "lie: 4 integers claimed, 64 MiB inside": lambda: shard_of(4, [2, 2], _lying_frame(bytes(64 << 20), 4)),
    "frame without its size": lambda: shard_of(4, [2, 2], frame(bytes(4), write_content_size=False)),
    "no frame": lambda: shard_of(4, [2, 2], b"not a frame at all"),
    "empty frame": lambda: shard_of(4, [2, 2], b""),
    "truncated frame": lambda: shard_of(4, [256, 2], frame(bytes(range(256)) * 2)[:-9]),
    "bytes after the frame": lambda: shard_of(4, [2, 2], frame(bytes(4)) + b"xx"),
    "two frames": lambda: shard_of(4, [2, 2], frame(bytes(4)) + frame(bytes(4))),
    "integers beyond their bits": lambda: shard_of(4, [2, 2], frame(bytes([8, 0, 0, 0]))),
    "packed too short": lambda: shard_of(4, [2, 2], b"x", codec="packed"),
    "packed too long": lambda: shard_of(4, [2, 2], b"xxx", codec="packed"),
    "9 bits": lambda: shard_of(9, [2, 2], frame(bytes(4))),
    "bits no number": lambda: shard_of("4", [2, 2], frame(bytes(4))),
    "no shape": lambda: shard_of(4, [], frame(bytes(1))),
    "negative shape": lambda: shard_of(4, [-2, -2], frame(bytes(4))),
    "unknown codec": lambda: shard_of(4, [2, 2], frame(bytes(4)), codec="lzma"),
    "no such tensor": lambda: indexed({"integers": [["a", 1, 4, 1]], "tensors": []}),
    "more metadata": lambda: indexed({"integers": [], "tensors": []}, x=""),
    "another format": lambda: indexed({"integers": [], "tensors": []}, format="nestquant.shard.v2"),
    "no index": lambda: save_tensors({}, {"codec": "zstd", "format": "nestquant.shard.v1"}),
}


def _lying_frame(data: bytes, claimed: int) -> bytes:
    """Return a frame whose header claims another content size (RFC 8878, 3.1.1.1)."""
    honest = bytearray(zstandard.ZstdCompressor(level=1).compress(data))
    assert honest[4] >> 6 == 2  # a content size of 4 bytes, and a window descriptor unless it is a single segment
    start = 5 if honest[4] & 0x20 else 6
    honest[start : start + 4] = claimed.to_bytes(4, "little")
    return bytes(honest)


@pytest.mark.parametrize("name", HOSTILE_SHARDS)
def test_hostile_shards_are_refused(name: str) -> None:
    data = HOSTILE_SHARDS[name]()
    with pytest.raises(InvalidShard):
        read_shard(data).payload("a", count=4 if "truncated" not in name else 512)


def test_payload_of_another_count_or_name_is_refused() -> None:
    shard = read_shard(build_shard({"a": packed_tensor([1, 2, 3, 4], 4)}, {}).data)
    with pytest.raises(InvalidShard, match=r"5 integers expected under 'a', seen \(1, 4\)"):
        shard.payload("a", count=5)
    with pytest.raises(InvalidShard, match="4 integers expected under 'b', seen none"):
        shard.payload("b", count=4)
    with pytest.raises(InvalidShard, match="no tensor 'scale'"):
        shard.tensor("scale")


VALID = build_shard({"a": integers((8, 16), 4, 1)}, {"a/scale": np.ones(8, np.float32)}).data


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_shard_is_refused_or_still_valid(data: st.DataObject) -> None:
    """Flip, cut or insert bytes: never anything but `InvalidShard`, and what is accepted the library accepts too."""
    damaged = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            damaged[position] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del damaged[position : position + data.draw(st.integers(1, 16))]
        else:
            damaged[position:position] = data.draw(st.binary(min_size=1, max_size=8))
        if not damaged:
            break
    try:
        shard = read_shard(bytes(damaged))
        for key, stored in shard.integers.items():
            shard.payload(key, count=math.prod(stored.shape))
    except InvalidShard:
        return
    try:
        tensors = dict(deserialize(bytes(damaged)))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise AssertionError(f"accepted here, refused by safetensors: {error}") from error
    assert set(tensors) == set(load_tensors(bytes(damaged))[0])
