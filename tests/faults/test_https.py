"""HTTPS for real: a certificate that is trusted, one that is not, and a redirect that would leave the encryption."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.device import Device, HttpClient, HttpSource, Retry
from storage.device.errors import DeviceError, SourceError
from storage.manifest import Manifest
from tests.faults import proxy as fault
from tests.faults.conftest import Origin, WebServer
from tests.faults.proxy import Proxy, faulty
from tests.servers.certificate import write_certificate
from tests.storage.device.artifacts import publish

FAST = Retry(attempts=2, base_s=0.001)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("tls") / "server.pem")


@pytest.fixture
def secure(web_server: WebServer, certificate: Path) -> Iterator[Proxy]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with faulty(web_server.url, tls=context) as proxy:
        yield proxy


@pytest.fixture
def manifest(origin: Origin) -> Manifest:
    return publish(origin.store)[0]


def device(folder: Path, secure: Proxy, origin: Origin, client: HttpClient | None = None) -> Device:
    source = HttpSource(f"{secure.url}/{origin.store.root.name}", client or HttpClient())
    return Device(folder, source, unsigned=True, retry=FAST)


@pytest.mark.usefixtures("manifest")
def test_a_certificate_that_nobody_vouches_for(secure: Proxy, origin: Origin, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:\d+ has no valid certificate: .*self-signed") as caught:
        device(tmp_path, secure, origin).pull("net")
    assert not caught.value.retryable
    assert secure.seen == []


@pytest.mark.usefixtures("manifest")
def test_a_trusted_certificate(
    secure: Proxy, origin: Origin, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.plan = lambda r: fault.cut_body(20_000, reset=False) if "blobs" in r.path and r.attempt == 0 else None
    reader = device(tmp_path, secure, origin)
    assert reader.pull("net", level=1).retries > 0
    assert reader.verify("net").whole


@pytest.mark.usefixtures("manifest")
def test_no_redirect_out_of_the_encryption(
    secure: Proxy, origin: Origin, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.plan = lambda r: fault.refuse(302, headers={"Location": origin.proxy.url + r.path})
    with pytest.raises(DeviceError, match="redirects from https to http"):
        device(tmp_path, secure, origin).pull("net")
    assert origin.proxy.seen == []


def test_secrets_stay_with_the_first_host(secure: Proxy, origin: Origin, manifest: Manifest, tmp_path: Path) -> None:
    """Another port is another host: the redirect is followed, the Authorization header is not."""
    client = HttpClient(headers={"Authorization": "Bearer secret"})
    with faulty(origin.proxy.upstream) as other:
        origin.proxy.plan = lambda r: fault.refuse(307, headers={"Location": other.url + r.path})
        reader = Device(tmp_path, HttpSource(origin.url, client), unsigned=True, retry=FAST)
        assert reader.pull("net").received_bytes == sum(blob.size_bytes for blob in manifest.descriptors()[:4])
    assert {request.headers.get("Authorization") for request in origin.proxy.seen} == {"Bearer secret"}
    assert {request.headers.get("Authorization") for request in other.seen} == {None}
    assert secure.seen == []
