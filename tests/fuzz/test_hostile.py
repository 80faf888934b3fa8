"""Hostile artifacts: refused with a reason; no crash, no hang, no stray write, no memory beyond what was declared."""

from __future__ import annotations

import copy
import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.device import Device, Retry, StoreSource
from storage.device.resolve import parse_release
from storage.errors import InvalidManifest, InvalidShard, StorageError
from storage.layout import CACHE_MARKER, blob_key, manifest_key, tag_key
from storage.manifest import canonical_json
from storage.references import TagRecord
from storage.shard import read_shard
from storage.stores.memory import MemoryStore
from tests.fuzz import corpus
from tests.fuzz.target import read_everything
from tests.fuzz.trusted import one_line
from tests.storage.device.artifacts import build, digest_of, put

SHARDS, FRAMES, MANIFESTS = corpus.shards(), corpus.frames(), corpus.manifests()
SLACK_BYTES = 4 << 20
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fuzz = settings(max_examples=400, deadline=2000, suppress_health_check=list(HealthCheck))


@contextmanager
def bounded(declared_bytes: int) -> Iterator[None]:
    """Fail when more memory was taken than ``declared_bytes`` and some slack, or more than 5 s went by."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= declared_bytes + SLACK_BYTES, f"{peak} bytes taken, {declared_bytes} declared"
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("name", SHARDS)
def test_shards(name: str) -> None:
    hostile = SHARDS[name]
    with bounded(4 * len(hostile.data)), pytest.raises(InvalidShard, match=hostile.message) as caught:
        read_shard(hostile.data)
    one_line(caught.value)


@pytest.mark.parametrize("name", FRAMES)
def test_frames(name: str) -> None:
    hostile = FRAMES[name]
    shard = read_shard(hostile.data)
    with bounded(4 * len(hostile.data)), pytest.raises(InvalidShard, match=hostile.message):
        shard.payload(corpus.KEY, count=64)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name: str) -> None:
    hostile = MANIFESTS[name]
    with bounded(8 * len(hostile.data)), pytest.raises(InvalidManifest, match=hostile.message) as caught:
        parse_release(hostile.data, "net", 1, signed=False)
    one_line(caught.value)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_device_takes_nothing_of_a_hostile_manifest(tmp_path: Path, name: str) -> None:
    store = MemoryStore()
    store.put(manifest_key("net", 1), MANIFESTS[name].data, mode="create")
    device = Device(tmp_path / "cache", StoreSource(store), unsigned=True)
    with pytest.raises(StorageError):
        device.pull("net", "1")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) in ([], [CACHE_MARKER, "lock"])


def test_the_corpus_starts_from_what_is_accepted() -> None:
    assert read_shard(corpus.good_shard("packed")).payload(corpus.KEY, count=32).size == 16
    assert read_shard(corpus.good_shard("zstd")).payload(corpus.KEY, count=256).size == 256
    assert parse_release(canonical_json(corpus.good_manifest()), "net", 1, signed=False).manifest.name == "net"


def mutate(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Return ``data`` with bytes dropped and put in."""
    for at, dropped, inserted in edits:
        cut = at % (len(data) + 1)
        data = data[:cut] + inserted + data[cut + dropped :]
    return data


EDITS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=4)


@fuzz
@given(st.binary(max_size=400))
def test_any_bytes_as_a_shard(data: bytes) -> None:
    with bounded(8 * len(data)):
        read_everything(data)


@fuzz
@given(st.sampled_from(["packed", "zstd"]), EDITS)
def test_a_damaged_shard(codec: str, edits: list[tuple[int, int, bytes]]) -> None:
    data = mutate(corpus.good_shard(codec), edits)
    with bounded(8 * len(data)):
        read_everything(data)


@fuzz
@given(st.data())
def test_a_header_that_lies(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(["packed", "zstd"]))
    index = corpus.good_index(codec)
    if data.draw(st.booleans()):
        lie(index, data.draw)
    header, payload = corpus.split(corpus.with_index(index, codec=codec))
    for _ in range(data.draw(st.integers(0, 2))):
        lie(header, data.draw)
    shard = corpus.join(header, payload)
    with bounded(8 * len(shard)):
        read_everything(shard)


def lie(document: Any, draw: Callable[[Any], Any]) -> None:
    """Replace, remove or add something somewhere within."""
    while isinstance(document, dict | list) and document:
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = draw(st.sampled_from(keys))
        if isinstance(document[key], dict | list) and document[key] and draw(st.booleans()):
            document = document[key]
            continue
        if draw(st.booleans()):
            document[key] = draw(JSON | st.sampled_from([0, -1, 1 << 31, 1 << 47, 1 << 63]))
        else:
            del document[key]
        return


@fuzz
@given(st.data())
def test_a_manifest_that_lies(data: st.DataObject) -> None:
    document = copy.deepcopy(corpus.good_manifest())
    for _ in range(data.draw(st.integers(1, 3))):
        lie(document, data.draw)
    try:
        raw = canonical_json(document)
    except (ValueError, TypeError):
        return
    with bounded(64 * len(raw)):
        try:
            release = parse_release(raw, "net", 1, signed=False)
        except StorageError as error:
            one_line(error)
        else:
            assert canonical_json(json.loads(raw)) == release.raw


@fuzz
@given(st.binary(max_size=300) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), EDITS)
def test_any_bytes_as_a_manifest(data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    for raw in (data, mutate(canonical_json(corpus.good_manifest()), edits)):
        try:
            parse_release(raw, "net", 1, signed=False)
        except StorageError as error:
            one_line(error)


NAMES = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(["..", ".", "/", "\\", "a", "con", "NUL", "aux.json", "C:", "~", "%2e", "\0", " ", "é"]),
        max_size=6,
    ).map("".join),
    st.sampled_from(
        ["../x", "/etc/passwd", "..\\x", "con", "lpt1.txt", "a/../../b", "Net", "net ", "net.", "nét", "a" * 300]
    ),
)


@settings(max_examples=300, deadline=2000, suppress_health_check=list(HealthCheck))
@given(NAMES, NAMES)
def test_names_and_refs(tmp_path_factory: pytest.TempPathFactory, name: str, ref: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(exist_ok=True)
    device = Device(folder / "cache", StoreSource(MemoryStore()), unsigned=True)
    calls: list[Callable[[], object]] = [
        lambda: device.pull(name, ref),
        lambda: device.pull("net", ref),
        lambda: device.upgrade(name),
        lambda: device.verify(name),
        lambda: device.rollback(name),
        lambda: device.remove(name),
        lambda: device.levels(name),
    ]
    for call in calls:
        try:
            call()
        except StorageError as error:
            one_line(error)
    assert {path.name for path in folder.iterdir()} <= {"cache"}
    assert {path.name for path in (folder / "cache").iterdir()} <= {CACHE_MARKER, "lock"}


@settings(max_examples=60, deadline=5000, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_store_that_serves_anything(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever stands under the keys: a pull ends whole, or with a reason and nothing wrong in place."""
    manifest, blobs = build("net", 1, b"base", [[b"high0" * 9, b"low0"], [b"high1" * 7, b"low1"]])
    store = MemoryStore()
    put(store, manifest, blobs)
    keys = [tag_key("net", "latest"), manifest_key("net", 1), *map(blob_key, blobs)]
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=3, unique=True)):
        store.put(key, mutate(store.get(key), data.draw(EDITS)), mode="overwrite")
    folder = tmp_path_factory.mktemp("served", numbered=True)
    device = Device(folder / "cache", StoreSource(store), unsigned=True, retry=Retry(attempts=2, base_s=0.0))
    try:
        device.pull("net", level=1)
    except StorageError as error:
        one_line(error)
    else:
        assert device.verify("net").whole
    assert os.listdir(folder) == ["cache"]
    for path in (folder / "cache").glob("blobs/*/*/*"):
        assert digest_of(path.read_bytes()) == f"sha256:{path.name}"


@fuzz
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_tag(raw: bytes) -> None:
    store = MemoryStore()
    store.put(tag_key("net", "latest"), raw, mode="create")
    with pytest.raises(StorageError) as caught:
        Device(Path("unused"), StoreSource(store), unsigned=True).resolve("net")
    one_line(caught.value)
    assert TagRecord.model_fields
