"""The manifest: its exact bytes, its rules, and hostile ones refused with the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import InvalidManifest
from storage.manifest import LayerRecord, Manifest, Piece, canonical_json, parse_manifest, piece_key
from storage.registry import Registry
from storage.stores.memory import MemoryStore
from tests.storage.artifacts import make_draft

DRAFT = make_draft(Registry(MemoryStore("manifest")))
RAW = canonical_json(DRAFT)


def changed(path: str, value: Any) -> bytes:
    """Return the manifest with one field replaced; a path such as ``layers.0.pieces.0.stop``."""
    document = json.loads(RAW)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = document
    for part in parents:
        place = place[part]
    place[last] = value
    return canonical_json(document)


def test_golden_bytes() -> None:
    raw = canonical_json({"b": [1, 2.5, None, True], "a": {"é": "\u2028"}, "A": -0.0})
    assert raw == '{"A":-0.0,"a":{"é":"\u2028"},"b":[1,2.5,null,true]}'.encode()
    layer = DRAFT.layers[0]
    assert canonical_json(layer) == (
        b'{"activation":null,"biases":false,"bits":[8,4],"groups":1,"kind":"conv2d","name":"conv0","parameter":"conv0.weight",'
        b'"pieces":[{"group":0,"start":0,"stop":16}],"scheme":"asymmetric","shape":[16,8,3,3]}'
    )
    assert piece_key("stage1.conv", 0, 64, 1) == "stage1.conv[0:64]/level1"


def test_round_trip() -> None:
    manifest = parse_manifest(RAW, name="net", version=1)
    assert manifest == DRAFT
    assert canonical_json(manifest) == RAW
    assert manifest.level_count() == 2
    digests = [blob.digest for blob in manifest.descriptors()]
    groups = manifest.groups
    assert digests == [
        manifest.base[0].digest,
        *(groups[index].levels[level].digest for level in (0, 1) for index in (0, 1)),
    ]


def test_no_nan_gets_in() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 5, "field schema_version"),
        ("schema_version", 4, "schema_version is 4 with 0 engines, no labels; expected 1"),
        ("schema_version", 3, "schema_version is 3 with 0 engines, no labels; expected 1"),
        ("schema_version", 2, "schema_version is 2 with 0 engines, no labels; expected 1"),
        ("surprise", 1, "field surprise: Extra inputs"),
        ("name", "../net", "field name"),
        ("name", "net\n", "field name"),
        ("version", 2, "says that it is net version 2"),
        ("version", 0, "field version"),
        ("layers.0.name", "conv1", "layer 'conv1' stands twice"),
        ("layers.0.name", "a\x00b", "field layers.0.name"),
        ("layers.0.name", "x" * 513, "field layers.0.name"),
        ("layers.0.bits", [4, 8], "bits (4, 8) do not fall"),
        ("layers.0.bits", [8, 8], "bits (8, 8) do not fall"),
        ("layers.0.bits", [9, 4], "field layers.0.bits.0"),
        ("layers.0.bits", [8, 0], "field layers.0.bits.1"),
        ("layers.0.bits", [8], "group 0 level 1: decoded_bytes 1152, its layers 0"),
        ("layers.0.bits", [8, 6, 4], "layer 'conv0': 3 levels, its shard group 0 has 2"),
        ("layers.0.shape", [], "field layers.0.shape"),
        ("layers.0.shape", [0, 8], "field layers.0.shape.0"),
        ("layers.0.shape", [1 << 30, 1 << 30], "at most 1099511627776 allowed"),
        ("layers.0.shape", [17, 8, 3, 3], "its pieces end at output channel 16 of 17"),
        ("layers.0.shape", [16, 8, 3, 4], "group 0 level 0: decoded_bytes 1152, its layers 1536"),
        ("layers.0.pieces", [], "field layers.0.pieces"),
        ("layers.0.pieces.0.group", 7, "layer 'conv0': shard group 7 of 2"),
        ("layers.0.pieces.0.group", -1, "field layers.0.pieces.0.group"),
        ("layers.0.pieces.0.start", 1, "its pieces leave a gap or overlap"),
        ("layers.0.pieces.0.stop", 15, "its pieces end at output channel 15 of 16"),
        (
            "layers.0.pieces",
            [{"group": 0, "start": 0, "stop": 9}, {"group": 0, "start": 8, "stop": 16}],
            "gap or overlap",
        ),
        (
            "layers.0.pieces",
            [{"group": 0, "start": 8, "stop": 16}, {"group": 0, "start": 0, "stop": 8}],
            "gap or overlap",
        ),
        ("groups.0.levels", [], "field groups.0.levels"),
        ("groups.0.levels.0.decoded_bytes", 1 << 39, "group 0 level 0: decoded_bytes 549755813888, its layers 1152"),
        ("groups.0.levels.0.digest", "sha256:" + "G" * 64, "field groups.0.levels.0.digest"),
        ("groups.0.levels.0.digest", "sha256:" + "0" * 64 + "\n", "field groups.0.levels.0.digest"),
        ("groups.0.levels.0.codec", "lzma", "field groups.0.levels.0.codec"),
        ("groups.0.levels.0.size_bytes", -1, "field groups.0.levels.0.size_bytes"),
        ("groups.0.levels.0.size_bytes", 1 << 60, "field groups.0.levels.0.size_bytes"),
        ("base.0.media_type", "x" * 129, "field base.0.media_type"),
        ("model.source_digest", "md5:0", "field model.source_digest"),
    ],
)
def test_hostile_manifests_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidManifest) as caught:
        parse_manifest(changed(path, value), name="net", version=1)
    assert message in str(caught.value)
    assert str(caught.value).startswith("manifest of net version 1: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        RAW + b" ",
        RAW[:-1],
        RAW.replace(b'"version":1', b'"version": 1'),
        RAW.replace(b'"version":1', b'"version":1,"version":1'),
        b"\xef\xbb\xbf" + RAW,
        RAW.decode().encode("utf-16"),
        b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a":' + b"9" * 100_000 + b"}",
        b'{"a":NaN}',
        b'{"a":"\\ud800"}',
    ],
)
def test_what_is_not_canonical_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidManifest, match="not canonical JSON"):
        parse_manifest(raw, name="net", version=1)


def test_a_manifest_over_the_limit_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.manifest.MAX_MANIFEST_BYTES", len(RAW) - 1)
    with pytest.raises(InvalidManifest, match=f"{len(RAW)} bytes, at most {len(RAW) - 1} allowed"):
        parse_manifest(RAW, name="net", version=1)


def test_transposed_convolutions_count_their_second_axis() -> None:
    def layer(stop: int) -> LayerRecord:
        return LayerRecord(
            name="up",
            kind="conv_transpose2d",
            parameter="up.weight",
            shape=(8, 3, 2, 2),
            groups=2,
            bits=(8,),
            scheme="symmetric",
            pieces=(Piece(group=0, start=0, stop=stop),),
        )

    assert layer(6).out_channels() == 6
    with pytest.raises(ValidationError, match="end at output channel 8 of 6"):
        layer(8)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


def paths(value: Any, prefix: str = "") -> list[str]:
    """Return the path of every node below the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in (f"{prefix}{key}", *paths(inner, f"{prefix}{key}."))]


PATHS = [path for path in paths(json.loads(RAW)) if not path.startswith(("recipe.", "tool_versions."))]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_any_value_anywhere_is_refused_or_well_formed(path: str, value: Any) -> None:
    """Whatever stands in any field: `InvalidManifest`, or a manifest that keeps all rules when written again."""
    try:
        manifest = parse_manifest(changed(path, value), name="net", version=1)
    except InvalidManifest:
        return
    assert Manifest.model_validate(manifest.model_dump()) == manifest


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(raw, name="net", version=1)
