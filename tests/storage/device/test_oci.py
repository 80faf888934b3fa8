"""A version in an OCI registry, a real one: pushed once, pulled high before low, resumed, and verified as anywhere."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import requests
from oras.provider import Registry as Oras

from storage.device import Device, Retry, open_source
from storage.device.errors import SourceError, SourceNotFound, Untrusted
from storage.device.oci import Place, push
from storage.errors import BadStoreURI, StoreUnavailable
from storage.layout import blob_key
from storage.stores.local import LocalStore
from tests.conftest import ROOT
from tests.storage.device.artifacts import publish
from tests.storage.device.signed import Publisher

SHARD_BYTES = 600_000


@pytest.fixture
def place(oci_registry: str) -> str:
    return f"oci://{oci_registry}/vision/{uuid.uuid4().hex}"


@pytest.fixture
def signed(publisher: Publisher) -> Publisher:
    for version in (1, 2):
        publish(publisher.store, version=version, fresh=[0], shard_bytes=SHARD_BYTES)
    publisher.sign(versions=[1], tags={"latest": 2})
    return publisher


def device(publisher: Publisher, folder: Path, uri: str) -> Device:
    retry = Retry(attempts=2, base_s=0.001)
    return Device(folder, open_source(uri), root_of_trust=publisher.anchor, retry=retry)


def artifact(uri: str, tag: str) -> dict[str, Any]:
    url = f"{Place.parse(uri).base_url}/manifests/{tag}"
    answer = requests.get(url, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"}, timeout=10)
    document: dict[str, Any] = answer.json()
    return document


def test_what_is_pushed_is_pulled_as_from_a_store(signed: Publisher, place: str, tmp_path: Path) -> None:
    pushed = push(signed.store, "net", "1", place)
    assert (pushed.version, pushed.tags, pushed.sent_bytes) == (1, ("1", "latest"), pushed.size_bytes)
    online, registry = signed.device(tmp_path / "online"), device(signed, tmp_path / "oci", place)
    assert registry.pull("net", "1") == online.pull("net", "1")
    assert registry.upgrade("net") == online.upgrade("net")
    assert registry.verify("net").whole
    with pytest.raises(SourceNotFound, match="net has no version 2 here"):
        registry.pull("net", "2")

    again = push(signed.store, "net", "1", place)
    assert (again.sent_bytes, again.digest) == (0, pushed.digest)
    second = push(signed.store, "net", "2", f"{place}:stable")
    assert 2 * SHARD_BYTES < second.sent_bytes < 3 * SHARD_BYTES, "two shards of seven blobs are new"
    stable = device(signed, tmp_path / "stable", f"{place}:stable")
    assert stable.pull("net", "latest").version == 2
    assert artifact(place, "1") == artifact(place, "latest") != artifact(place, "stable")


def test_it_is_a_modelpack_artifact_in_fetching_order(signed: Publisher, place: str, tmp_path: Path) -> None:
    push(signed.store, "net", "1", place)
    manifest = artifact(place, "1")
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    weights = [
        layer for layer in manifest["layers"] if layer["mediaType"].startswith("application/vnd.cncf.model.weight.v1")
    ]
    blobs = signed.device(tmp_path / "x").resolve("net", "1").manifest.descriptors()
    assert [layer["digest"] for layer in weights] == [blob.digest for blob in blobs]
    assert [layer["annotations"]["org.cncf.model.filepath"] for layer in weights][:2] == [
        "0000.safetensors",
        "0001.safetensors",
    ]
    client = Oras(hostname=Place.parse(place).host, insecure=True)  # a tool of others
    container = client.get_container(f"{place.removeprefix('oci://')}:1")
    config = client.get_blob(container, manifest["config"]["digest"]).json()
    assert config["descriptor"]["name"] == "net"
    assert config["modelfs"] == {"type": "layers", "diffIds": [blob.digest for blob in blobs]}
    assert client.get_blob(container, blobs[0].digest).content == signed.store.get(blob_key(blobs[0].digest))
    assert sorted(client.get_tags(container)) == ["1", "latest"]


CHILD = """
import sys
from pathlib import Path
from storage.device import Device, Pace, open_source
anchor, pace = Path(sys.argv[3]).read_bytes(), Pace(700_000)
device = Device(Path(sys.argv[1]), open_source(sys.argv[2]), root_of_trust=anchor, pace=pace)
device.pull("net", "1", level=1)
"""


def test_a_pull_that_is_killed_goes_on_where_it_was(signed: Publisher, place: str, tmp_path: Path) -> None:
    push(signed.store, "net", "1", place)
    (tmp_path / "root.json").write_bytes(signed.anchor)
    argv = [sys.executable, "-c", CHILD, str(tmp_path / "cache"), place, str(tmp_path / "root.json")]
    with subprocess.Popen(argv, cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            parts = list((tmp_path / "cache").glob("staging/*.part"))
            whole = list((tmp_path / "cache").glob("blobs/sha256/*/*"))
            if len(whole) >= 2 and any(part.exists() and part.stat().st_size > SHARD_BYTES // 4 for part in parts):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    moved = device(signed, tmp_path / "cache", place).pull("net", "1", level=1)
    total = sum(blob.size_bytes for blob in device(signed, tmp_path / "cache", place).manifest("net").descriptors())
    assert moved.resumed_bytes > SHARD_BYTES // 4
    assert moved.saved_bytes > SHARD_BYTES
    assert moved.wasted_bytes == 0
    assert moved.received_bytes + moved.resumed_bytes + moved.saved_bytes == total


def test_a_registry_is_believed_no_more_than_a_store(signed: Publisher, place: str, tmp_path: Path) -> None:
    unsigned = LocalStore(tmp_path / "unsigned")
    publish(unsigned)
    push(unsigned, "net", "1", place)
    with pytest.raises(Untrusted, match="nothing signed for it here"):
        device(signed, tmp_path / "a", place).pull("net", "1")
    assert Device(tmp_path / "b", open_source(place), unsigned=True).pull("net").version == 1
    push(signed.store, "net", "1", f"{place}-old")
    time.sleep(0.01)
    signed.sign(tags={"latest": 2})
    assert signed.device(tmp_path / "c").pull("net").version == 2
    with pytest.raises(Untrusted, match="the source offers older metadata than was trusted before"):
        device(signed, tmp_path / "c", f"{place}-old").pull("net", "1")


def test_what_is_none_of_ours_is_one_line(signed: Publisher, place: str, oci_registry: str, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=f"{Place.parse(place).repository}:latest: HTTP 404"):
        device(signed, tmp_path / "a", place)._documents("net").read("models/net/versions/00000001.json", max_bytes=10)
    client = Oras(hostname=oci_registry, insecure=True)
    (tmp_path / "note.txt").write_text("a note")
    client.push(
        target=f"{place.removeprefix('oci://')}:1", files=[str(tmp_path / "note.txt")], disable_path_validation=True
    )
    with pytest.raises(SourceError, match=r"is no version of ours \(a field is missing\)"):
        device(signed, tmp_path / "a", f"{place}:1")._documents("net").read("models/net/x.json", max_bytes=10)
    with pytest.raises(StoreUnavailable, match="is it a registry"):
        push(signed.store, "net", "1", "oci://127.0.0.1:9/vision/net")


@pytest.mark.parametrize(
    "uri", ["oci://", "oci://host", "oci://host/Upper", "oci://u:p@host/x", "oci://host/x@sha256:1", "oci:/h/x"]
)
def test_places_that_are_none(uri: str) -> None:
    with pytest.raises(BadStoreURI, match="expected oci://host/repository"):
        Place.parse(uri)
