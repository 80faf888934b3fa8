"""The same proxy before an S3 server: devices with keys, devices with presigned URLs alone, and URLs that expire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from storage.device import Device, HttpSource, PresignedSource, Retry, open_source
from storage.device.errors import SourceDenied, SourceNotFound
from storage.device.http import UrlIndex
from storage.device.presign import Presigner, keys_of, trust_keys_of
from storage.manifest import Manifest
from storage.signing.metadata import sign
from storage.signing.root import create_root
from storage.stores.s3 import S3Store
from storage.stores.uri import open_store
from tests.faults import proxy as fault
from tests.faults.proxy import Proxy, faulty
from tests.servers.s3_server import S3Server
from tests.storage.device.artifacts import publish

FAST = Retry(attempts=4, base_s=0.001, cap_s=0.01)


@pytest.fixture(params=["moto_s3", "ceph_s3"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with faulty(server.endpoint_url) as running:
        yield running


@pytest.fixture
def store(server: S3Server, proxy: Proxy) -> S3Store:
    """A store whose address is the proxy's."""
    opened = open_store(server.uri().replace(server.endpoint_url.rsplit(":", 1)[1], proxy.url.rsplit(":", 1)[1]))
    assert isinstance(opened, S3Store)
    return opened


@pytest.fixture
def manifest(store: S3Store) -> Manifest:
    return publish(store, groups=2, shard_bytes=200_000)[0]


def blob_requests(proxy: Proxy) -> int:
    return sum(request.method == "GET" and "/blobs/" in request.path for request in proxy.seen)


def test_a_device_with_keys(store: S3Store, proxy: Proxy, manifest: Manifest, tmp_path: Path) -> None:
    proxy.seen.clear()
    device = Device(tmp_path, open_source(store.uri), unsigned=True, retry=FAST)
    assert device.pull("net", level=1).retries == 0
    assert device.verify("net").whole
    assert blob_requests(proxy) == len(manifest.descriptors())
    assert {request.method for request in proxy.seen} == {"GET"}


FAULTS = {
    "SlowDown": (fault.refuse(503, "SlowDown"), 0),
    "cut": (fault.cut_body(90_000, reset=False), 0),
    "reset": (fault.cut_body(90_000, reset=True), 0),
    "flipped": (fault.flip(90_000), 200_000),
    "error inside a 200": (fault.body(b"<Error><Code>InternalError</Code></Error>"), 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(store: S3Store, proxy: Proxy, manifest: Manifest, tmp_path: Path, name: str) -> None:
    broken, wasted = FAULTS[name]
    hit = manifest.groups[0].levels[0].digest[7:]
    proxy.seen.clear()
    proxy.plan = lambda r: broken if hit in r.path and sum(hit in seen.path for seen in proxy.seen) == 1 else None
    device = Device(tmp_path, open_source(store.uri), unsigned=True, retry=FAST)
    moved = device.pull("net")
    assert (moved.retries, moved.wasted_bytes) == (1, wasted)
    assert device.verify("net").whole


def test_credentials_that_end_in_mid_pull(store: S3Store, proxy: Proxy, manifest: Manifest, tmp_path: Path) -> None:
    hit = manifest.groups[1].levels[0].digest[7:]
    proxy.plan = lambda r: fault.refuse(403, "ExpiredToken") if hit in r.path else None
    device = Device(tmp_path, open_source(store.uri), unsigned=True, retry=FAST)
    with pytest.raises(SourceDenied, match="HTTP 403 ExpiredToken"):
        device.pull("net")
    proxy.plan = lambda _: None
    moved = device.pull("net")
    assert (moved.blobs_kept, moved.blobs_moved) == (2, 1)
    assert device.verify("net").whole


def test_a_signed_version_through_presigned_urls(store: S3Store, manifest: Manifest, tmp_path: Path) -> None:
    key = CryptoSigner.generate_ed25519()
    anchor = create_root(store, [key], publishers=[key.public_key], online=[key.public_key])
    done = sign(store, "net", [key], tags={"latest": 1})
    signed_keys = trust_keys_of("net", edition=done.edition, root_version=1)
    index = tmp_path / "index.json"
    index.write_bytes(Presigner(store).index([*keys_of(manifest, tags=()), *signed_keys]))
    source = open_source(f"presigned:{index}")
    device = Device(tmp_path / "cache", source, root_of_trust=anchor, retry=FAST)
    assert device.pull("net", level=1).signed
    assert device.verify("net").whole


def test_presigned_urls_that_expire_in_mid_pull(
    store: S3Store, proxy: Proxy, manifest: Manifest, tmp_path: Path
) -> None:
    """The gateway puts a new index in the same place; the device reads it again and goes on."""
    index = tmp_path / "index.json"
    index.write_bytes(Presigner(store, expires_s=600).index(keys_of(manifest)))
    stale = set(json.loads(index.read_bytes())["urls"].values())
    hit = manifest.groups[1].levels[0].digest[7:]

    def expire(request: fault.Request) -> fault.Fault | None:
        if hit not in request.path or not any(url.endswith(request.path) for url in stale):
            return None
        index.write_bytes(Presigner(store, expires_s=601).index(keys_of(manifest)))
        return fault.refuse(403, "AccessDenied")

    proxy.plan = expire
    device = Device(tmp_path / "cache", open_source(f"presigned:{index}"), unsigned=True, retry=FAST)
    device.pull("net")
    assert device.verify("net").whole


def test_presigned_urls_that_expired_for_good(
    store: S3Store, server: S3Server, manifest: Manifest, tmp_path: Path
) -> None:
    if server.name == "moto":
        pytest.skip("moto accepts expired presigned URLs")
    index = Presigner(store, expires_s=1).index(keys_of(manifest))
    url = json.loads(index)["urls"]["models/net/tags/latest.json"].replace("X-Amz-Expires=1&", "X-Amz-Expires=0&")
    device = Device(tmp_path, PresignedSource(lambda _key, _fresh: url), unsigned=True, retry=FAST)
    with pytest.raises(SourceDenied, match="has the URL expired"):
        device.pull("net")


def test_a_key_that_the_index_does_not_name() -> None:
    source = PresignedSource(UrlIndex(lambda: b'{"urls":{}}'))
    with (
        pytest.raises(SourceNotFound, match="blobs/x: the index of presigned URLs does not name it"),
        source.open("blobs/x"),
    ):
        pass


def test_the_index_over_http(store: S3Store, proxy: Proxy, manifest: Manifest, tmp_path: Path) -> None:
    store.put("devices/index.json", Presigner(store).index(keys_of(manifest)), mode="create")
    place = Presigner(store).url("devices/index.json")
    device = Device(tmp_path, open_source(f"presigned:{place}"), unsigned=True, retry=FAST)
    assert device.pull("net", level=1).blobs_moved == len(manifest.descriptors())
    assert isinstance(open_source("https://example.org/models"), HttpSource)
