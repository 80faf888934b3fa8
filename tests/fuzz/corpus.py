"""Hostile artifacts by hand: every trick that we know of, each with the words that its rejection must hold.

The shards are also the seeds of the atheris target (``tests/fuzz/target.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from nestquant.packing import pack
from storage.manifest import Manifest, canonical_json
from storage.shard import IntegerTensor, build_shard
from storage.tensor_file import save_tensors
from tests.storage.device.artifacts import build, digest_of

Json = dict[str, Any]


@dataclass(frozen=True)
class Hostile:
    """``data`` must be refused with an error that matches ``message``."""

    data: bytes
    message: str


def good_shard(codec: str = "packed") -> bytes:
    """Return a valid shard: one piece ``a[0:4]/level0`` of 32 integers at 4 bits, one tensor ``a/scale``."""
    if codec == "zstd":
        values = np.zeros((4, 64), np.int8)
    else:
        values = np.random.default_rng(0).integers(-8, 8, (4, 8), dtype=np.int8)
    packed = np.asarray(pack(values, 4)).reshape(-1).view(np.uint8)
    tensor = IntegerTensor(values, packed, 4, values.shape)
    encoded = build_shard({"a[0:4]/level0": tensor}, {"a/scale": np.ones(4, np.float32)})
    assert encoded.codec == codec
    return encoded.data


def split(shard: bytes) -> tuple[Json, bytes]:
    """Return a shard's header and payload."""
    size = int.from_bytes(shard[:8], "little")
    return json.loads(shard[8 : 8 + size]), shard[8 + size :]


def join(header: Json | bytes | str, payload: bytes) -> bytes:
    """Return a safetensors file with this header, right or wrong."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(raw).to_bytes(8, "little") + raw + payload


def edited(change: Callable[[Json], object], *, codec: str = "packed", payload: bytes | None = None) -> bytes:
    header, rest = split(good_shard(codec))
    change(header)
    return join(header, rest if payload is None else payload)


KEY = "a[0:4]/level0"
INTEGERS, SCALE = "integers", "tensors"  # the sections in which they stand


def good_index(codec: str = "packed") -> Json:
    """Return the index of the good shard."""
    size = split(good_shard(codec))[0][INTEGERS]["shape"][0]
    return {"integers": [[KEY, size, 4, 4, 64 if codec == "zstd" else 8]], "tensors": [["a/scale", "F32", 4]]}


def with_index(index: object, *, codec: str = "packed") -> bytes:
    """Return the good shard with another index: a document, its text, or the very bytes of its frame."""
    header, payload = split(good_shard(codec))
    if isinstance(index, bytes):
        frame = index
    else:
        text = index if isinstance(index, str) else json.dumps(index)
        frame = zstandard.compress(text.encode("utf-8", "surrogatepass"))
    tensors = {"index": np.frombuffer(frame, np.uint8)}
    for key in (INTEGERS, SCALE):
        start, stop = header[key]["data_offsets"]
        tensors[key] = np.frombuffer(payload[start:stop], np.uint8)
    return save_tensors(tensors, header["__metadata__"])


def described(*integers: list[object]) -> bytes:
    """Return the good shard whose index says this of its integers."""
    return with_index({"integers": list(integers), "tensors": good_index()["tensors"]})


def with_frame(frame: bytes, count: int) -> bytes:
    """Return a zstd shard of ``count`` integers in the given frame."""
    index = zstandard.compress(json.dumps({"integers": [[KEY, len(frame), 4, count]], "tensors": []}).encode())
    sections = {"index": index, "integers": frame, "tensors": zstandard.compress(b"")}
    tensors = {name: np.frombuffer(raw, np.uint8) for name, raw in sections.items()}
    return save_tensors(tensors, {"codec": "zstd", "format": "nestquant.shard.v1"})


def bomb(count: int) -> bytes:
    """Return a small frame that decodes to ``count`` zeros."""
    return zstandard.ZstdCompressor(level=1).compress(bytes(count))


def _unsized(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


def shards() -> dict[str, Hostile]:
    """Return hostile shards by name; all are refused by ``read_shard`` itself."""
    good = good_shard()
    header, payload = split(good)
    tensor, end = header[INTEGERS], len(payload)
    huge = 1 << 47
    return {
        "empty": Hostile(b"", "header of 0 bytes in a file of 0"),
        "seven bytes": Hostile(b"\0" * 7, "header of 0 bytes in a file of 7"),
        "header longer than the file": Hostile((1 << 20).to_bytes(8, "little") + b"{}", "header of 1048576 bytes"),
        "header of 2**64 - 1": Hostile(b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
        "header beyond the cap": Hostile(
            (17 << 20).to_bytes(8, "little") + b" " * (17 << 20), "at most 16777216 allowed"
        ),
        "not UTF-8": Hostile(join(b"\xff\xfe", b""), "header is not JSON"),
        "not JSON": Hostile(join("{", b""), "header is not JSON"),
        "a list": Hostile(join("[]", b""), "header is not a JSON object"),
        "nested without end": Hostile(join("[" * 100_000, b""), "header is not JSON"),
        "nested objects without end": Hostile(join('{"a":' * 100_000, b""), "header is not JSON"),
        "a number of 100,000 digits": Hostile(join('{"a":' + "9" * 100_000 + "}", b""), "header is not JSON"),
        "a key twice": Hostile(join('{"a":1,"a":2}', b""), "a key stands twice"),
        "NaN as an offset": Hostile(
            edited(lambda h: h[INTEGERS].update(data_offsets=[0, float("nan")])), "NaN is no number of JSON"
        ),
        "metadata that is a list": Hostile(edited(lambda h: h.update(__metadata__=[])), "__metadata__ is not a map"),
        "metadata of numbers": Hostile(edited(lambda h: h.update(__metadata__={"a": 1})), "__metadata__ is not a map"),
        "no metadata": Hostile(edited(lambda h: h.pop("__metadata__")), "format None"),
        "another format": Hostile(edited(lambda h: h["__metadata__"].update(format="pt")), "format 'pt'"),
        "another codec": Hostile(edited(lambda h: h["__metadata__"].update(codec="pickle")), "codec 'pickle'"),
        "more metadata": Hostile(edited(lambda h: h["__metadata__"].update(more="x")), "metadata .*'more'"),
        "an index that is no JSON": Hostile(with_index("{"), "index is not JSON"),
        "an index with a lone surrogate": Hostile(with_index("\ud800"), "index is not JSON"),
        "an index that is no frame": Hostile(with_index(b"PK\x03\x04 no frame"), "not a zstd frame"),
        "an index that is a bomb": Hostile(with_index(bomb(64 << 20)), "an index of 67108864 bytes, at most 16777216"),
        "an index that hides its size": Hostile(with_index(_unsized(b"{}")), r"an index of -?\d+ bytes, at most"),
        "no index": Hostile(edited(lambda h: h.update(x=h.pop("index"))), "data_offsets"),
        "an index of floats": Hostile(
            save_tensors({"index": np.ones(2)}, {"codec": "packed", "format": "nestquant.shard.v1"}),
            "expected \\['index'",
        ),
        "an index without integers": Hostile(with_index({"tensors": []}), "the index is not"),
        "an index with more": Hostile(with_index({**good_index(), "more": 1}), "the index is not"),
        "integers that are a map": Hostile(with_index({"integers": {}, "tensors": []}), "the index is not"),
        "integers without a name": Hostile(described([16, 4, 4, 8]), "a name in the index is no string"),
        "a name twice": Hostile(described(["a/scale", 16, 4, 4, 8]), "stands twice"),
        "names that are lists": Hostile(described([["a"], 16, 4, 4, 8]), "a name in the index is no string"),
        "integers that are not there": Hostile(described([KEY, 16, 4, 4, 8], ["b", 4, 4, 8]), "4 bytes, 0 left"),
        "integers of nobody": Hostile(described(), "16 bytes of integers, the index accounts for 0"),
        "a tensor of nobody": Hostile(
            with_index({"integers": good_index()["integers"], "tensors": []}),
            "16 bytes of tensors, the index accounts for 0",
        ),
        "a tensor of another type": Hostile(
            with_index({"integers": good_index()["integers"], "tensors": [["a/scale", "F64", 4]]}),
            "16 bytes of tensors, the index accounts for 32",
        ),
        "a tensor of no type": Hostile(
            with_index({"integers": good_index()["integers"], "tensors": [["a/scale", ["F32"], 4]]}),
            "is not a dtype and a shape",
        ),
        "a tensor of negative size": Hostile(
            with_index({"integers": good_index()["integers"], "tensors": [["a/scale", "F32", -4]]}),
            "is not a dtype and a shape",
        ),
        "nine bits": Hostile(described([KEY, 16, 9, 4, 8]), r"is not \[bits, \*shape\]"),
        "no bits": Hostile(described([KEY, 16, 0, 4, 8]), r"is not \[bits, \*shape\]"),
        "a negative size": Hostile(described([KEY, 16, 4, -4, -8]), r"is not \[bytes, bits, \*shape\]"),
        "bits that are true": Hostile(described([KEY, 16, True, 4, 8]), r"is not \[bytes, bits, \*shape\]"),
        "sizes of 2**47": Hostile(described([KEY, 16, 4, huge, huge, huge]), r"is not \[bytes, bits, \*shape\]"),
        "sizes of 10**4000": Hostile(described([KEY, 16, 4, 10**4000]), r"is not \[bytes, bits, \*shape\]"),
        "thirty dimensions": Hostile(described([KEY, 16, 4, *[1] * 30]), r"is not \[bytes, bits, \*shape\]"),
        "one integer too many": Hostile(described([KEY, 16, 4, 3, 11]), "16 bytes packed, expected 17"),
        "an unknown dtype": Hostile(edited(lambda h: h[INTEGERS].update(dtype="OBJECT")), "expected dtype"),
        "a dtype that is a list": Hostile(edited(lambda h: h[INTEGERS].update(dtype=["U8"])), "expected dtype"),
        "a field too many": Hostile(edited(lambda h: h[INTEGERS].update(extra=1)), "expected dtype"),
        "a tensor that is null": Hostile(edited(lambda h: h.update({INTEGERS: None})), "expected dtype"),
        "offsets beyond the file": Hostile(edited(lambda h: h[INTEGERS].update(shape=[1 << 40])), "data_offsets"),
        "offsets that overlap": Hostile(edited(lambda h: h[SCALE].update(data_offsets=[0, 16])), "data_offsets"),
        "a hole": Hostile(edited(lambda h: h[SCALE].update(data_offsets=[20, 36])), "data_offsets"),
        "offsets backwards": Hostile(edited(lambda h: h[INTEGERS].update(data_offsets=[16, 0])), "data_offsets"),
        "negative offsets": Hostile(edited(lambda h: h[INTEGERS].update(data_offsets=[-16, 0])), "data_offsets"),
        "a size that overflows": Hostile(edited(lambda h: h[INTEGERS].update(shape=[huge, huge])), "data_offsets"),
        "an empty tensor of absurd shape": Hostile(
            join({**header, "z": {**tensor, "shape": [0, huge, huge], "data_offsets": [end, end]}}, payload), "shape"
        ),
        "bytes after the end": Hostile(good + b"\0", r"\d+ bytes of payload, its header accounts for"),
        "cut": Hostile(good[:-1], "data_offsets"),
        "not a frame": Hostile(with_frame(b"PK\x03\x04 no frame at all", 64), "not a zstd frame"),
        "an empty frame": Hostile(with_frame(b"", 64), "not a zstd frame"),
        "a bomb behind a small claim": Hostile(with_frame(bomb(64 << 20), 64), "a zstd frame of 67108864 bytes"),
        "a frame that hides its size": Hostile(with_frame(_unsized(bytes(64)), 64), "a zstd frame of"),
    }


def frames() -> dict[str, Hostile]:
    """Return shards that pass ``read_shard`` and must be refused when a payload of 64 integers is asked for."""
    whole = bomb(64)
    return {
        "another number of integers": Hostile(with_frame(bomb(65), 65), "64 integers expected"),
        "a bomb that claims what it holds": Hostile(with_frame(bomb(64 << 20), 64 << 20), "64 integers expected"),
        "a frame cut short": Hostile(with_frame(whole[:-1], 64), "does not decode"),
        "two frames": Hostile(with_frame(whole + whole, 64), "does not decode"),
        "bytes after the frame": Hostile(with_frame(whole + b"\0", 64), "does not decode"),
        "integers beyond their bits": Hostile(with_frame(zstandard.compress(b"\x7f" * 64), 64), "beyond 4 signed bits"),
    }


def good_manifest() -> Json:
    """Return the document of a valid manifest."""
    manifest, _ = build("net", 1, b"base", [[b"high0", b"low0"], [b"high1", b"low1"]])
    return json.loads(canonical_json(manifest))  # type: ignore[no-any-return]


def manifests() -> dict[str, Hostile]:
    """Return hostile manifests, to be read as version 1 of ``net``."""

    def change(path: str, value: object) -> bytes:
        document = good_manifest()
        *parents, last = path.split("/")
        at: Any = document
        for part in parents:
            at = at[int(part) if part.isdigit() else part]
        at[int(last) if last.isdigit() else last] = value
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    raw = canonical_json(Manifest.model_validate(good_manifest()))
    digest = "groups/0/levels/0/digest"
    return {
        "empty": Hostile(b"", "not canonical JSON"),
        "not UTF-8": Hostile(b"\xff" + raw, "not canonical JSON"),
        "nested without end": Hostile(b"[" * 200_000, "not canonical JSON"),
        "white space": Hostile(raw.replace(b",", b", ", 1), "not canonical JSON"),
        "a key twice": Hostile(raw.replace(b'"version":1}', b'"version":1,"version":1}'), "not canonical JSON"),
        "NaN": Hostile(raw.replace(b'"bits":[8,4]', b'"bits":NaN'), "not canonical JSON"),
        "a list": Hostile(b"[]", "not canonical JSON"),
        "an unknown key": Hostile(change("zzz", 1), "field zzz: Extra inputs"),
        "another schema": Hostile(change("schema_version", 5), "field schema_version"),
        "a schema without what it is for": Hostile(
            change("schema_version", 2), "schema_version is 2 with 0 engines, no labels; expected 1"
        ),
        "labels under a schema that has none": Hostile(
            change("labels", good_manifest()["base"][0]), "schema_version is 1 with 0 engines, labels; expected 3"
        ),
        "another model's": Hostile(change("name", "other"), "says that it is other version 1"),
        "another version's": Hostile(change("version", 2), "says that it is net version 2"),
        "a name that climbs": Hostile(change("name", "../../evil"), "field name"),
        "version 10**30": Hostile(change("version", 10**30), "version"),
        "a digest that climbs": Hostile(
            change(digest, "sha256:../../../../etc/passwd"), "field groups.0.levels.0.digest"
        ),
        "a digest in capitals": Hostile(change(digest, digest_of(b"").upper()), "field groups.0.levels.0.digest"),
        "a digest with a newline": Hostile(change(digest, digest_of(b"") + "\n"), "field groups.0.levels.0.digest"),
        "another algorithm": Hostile(change(digest, "md5:" + "0" * 32), "field groups.0.levels.0.digest"),
        "a negative size": Hostile(change("groups/0/levels/0/size_bytes", -1), "field groups.0.levels.0.size_bytes"),
        "a size of 2**63": Hostile(change("groups/0/levels/0/size_bytes", 1 << 63), "size_bytes"),
        "a size that is a float": Hostile(change("groups/0/levels/0/size_bytes", 1.5), "size_bytes"),
        "a size that is a string": Hostile(change("groups/0/levels/0/size_bytes", "x"), "size_bytes"),
        "one digest, two sizes": Hostile(
            change("groups/1/levels/0", {**good_manifest()["groups"][0]["levels"][0], "size_bytes": 6}),
            "is said to have 5 and 6 bytes",
        ),
        "decoded bytes of a bomb": Hostile(
            change("groups/0/levels/0/decoded_bytes", 1 << 39), "decoded_bytes 549755813888"
        ),
        "a group that is not there": Hostile(change("layers/0/pieces/0/group", 7), "shard group 7 of 2"),
        "channels with a gap": Hostile(change("layers/0/pieces/0/start", 1), "leave a gap or overlap"),
        "channels beyond the shape": Hostile(change("layers/0/pieces/0/stop", 17), "end at output channel 17 of 16"),
        "a shape of 2**80": Hostile(change("layers/0/shape", [1 << 40, 1 << 40]), "layers.0"),
        "a shape of zero": Hostile(change("layers/0/shape", [0, 8]), "layers.0"),
        "a layer twice": Hostile(change("layers/1/name", "block.0"), "layer 'block.0' stands twice"),
        "no levels": Hostile(change("groups/0/levels", []), "field groups.0.levels"),
        "levels that the bits deny": Hostile(change("layers/0/bits", [8, 6, 4]), "levels"),
        "bits that rise": Hostile(change("layers/0/bits", [4, 8]), "do not fall"),
        "an unknown codec": Hostile(change("groups/0/levels/0/codec", "pickle"), "field groups.0.levels.0.codec"),
    }
