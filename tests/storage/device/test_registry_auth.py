"""Registries that want to know who asks: real ones, with a password file, and with a token service."""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from storage.device import Device, Retry, open_source
from storage.device.errors import SourceDenied, SourceError
from storage.device.http import HttpClient
from storage.device.oci import push
from storage.device.registry_auth import authorization, docker_credentials
from storage.stores.local import LocalStore
from tests.servers.oci_registry import oci
from tests.storage.device.artifacts import publish

SECRET = base64.b64encode(b"ann:secret").decode()
HASH = "ann:$2b$04$YqWi3I3Tw254fB1/kRZZkeM4fJt60DgWodsscfqK8QkUjF9GbUCHC\n"

Login = Callable[[str, object], None]


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    """Return what notes an entry for a host as ``docker login`` does."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    def note(host: str, entry: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {host: entry}}))

    return note


def device(folder: Path, uri: str) -> Device:
    return Device(folder, open_source(uri), unsigned=True, retry=Retry(attempts=1))


def test_a_registry_with_a_password_file(oci_registry: str, login: Login, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(HASH)
    store = LocalStore(tmp_path / "store")
    publish(store)
    with oci(tmp_path, f"auth: {{htpasswd: {{realm: here, path: {users}}}}}") as host:
        place = f"oci://{host}/vision/{uuid.uuid4().hex}"
        with pytest.raises(SourceDenied, match=rf"{host} wants a user and a password; 'docker login {host}' first"):
            device(tmp_path / "nobody", place).pull("net")
        login(host, {"auth": SECRET})
        push(store, "net", "1", place)
        known = device(tmp_path / "ann", place)
        assert known.pull("net").version == 1
        assert known.upgrade("net").level == 1
        assert known.verify("net").whole
        login(host, {"auth": base64.b64encode(b"ann:wrong").decode()})
        with pytest.raises(SourceDenied, match="HTTP 401"):
            device(tmp_path / "wrong", place).pull("net")


class TokenService:
    """Gives tokens for reading to everyone who has the password, or to anyone; the registry checks its signature."""

    def __init__(self, folder: Path, *, lasts_s: int = 60, public: bool = False) -> None:
        self.lasts_s, self.public, self.given, self.actions = lasts_s, public, 0, ["pull"]
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")]), datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(self.key.public_key())
        builder = builder.serial_number(1).not_valid_before(now - timedelta(days=1))
        self.certificate = builder.not_valid_after(now + timedelta(days=1)).sign(self.key, hashes.SHA256())
        self.bundle = folder / "bundle.pem"
        self.bundle.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def reply(self, path: str, authorization: str | None) -> bytes:
        if authorization != f"Basic {SECRET}" and not self.public:
            return b""
        return json.dumps({"token": self.token(parse_qs(urlsplit(path).query)["scope"][0])}).encode()

    def token(self, scope: str) -> str:
        self.given += 1
        kind, name, _ = scope.split(":")
        der = self.certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        claims = {
            "iss": "tokens",
            "sub": "ann",
            "aud": "registry",
            "jti": uuid.uuid4().hex,
            "exp": now + self.lasts_s,
            "nbf": now - 10,
            "iat": now,
            "access": [{"type": kind, "name": name, "actions": self.actions}],
        }
        signed = ".".join(_url64(json.dumps(part).encode()) for part in (header, claims))
        return f"{signed}.{_url64(self.key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@contextmanager
def serving(reply: Callable[[str, str | None], bytes]) -> Iterator[str]:
    """Answer each request with what ``reply(path, authorization)`` returns; with 401 where that is nothing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = reply(self.path, self.headers.get("Authorization"))
            self.send_response(200 if body else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/token"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("public", [False, True])
def test_a_registry_with_a_token_service(oci_registry: str, login: Login, tmp_path: Path, public: bool) -> None:
    """Public ones want a token of everyone, too; one that has ended is replaced in mid-pull."""
    service = TokenService(tmp_path, public=public)
    store = LocalStore(tmp_path / "store")
    publish(store)
    with serving(service.reply) as realm:
        settings = f"realm: {realm}, service: registry, issuer: tokens, rootcertbundle: {service.bundle}"
        with oci(tmp_path, f"auth: {{token: {{{settings}}}}}") as host:
            place = f"oci://{host}/vision/net"
            login(host, {"auth": SECRET})
            service.actions = ["pull", "push"]
            push(store, "net", "1", place)
            service.actions = ["pull"]
            if public:
                login("another.example", {"auth": SECRET})
            service.given = 0
            known = device(tmp_path / "device", place)
            assert known.pull("net").version == 1
            assert service.given == 1  # one for all requests
            service.lasts_s = -200  # beyond the registry's leeway: as good as none
            with pytest.raises(SourceDenied, match="HTTP 401"):
                device(tmp_path / "late", place).pull("net")
            service.lasts_s = 60
            assert known.upgrade("net").level == 1
            if not public:
                login("another.example", {"auth": SECRET})
                with pytest.raises(SourceDenied, match=rf"the token of {host}: HTTP 401: 'docker login {host}' first"):
                    device(tmp_path / "nobody", place).pull("net")


@pytest.mark.parametrize(
    ("challenge", "told"),
    [
        ('Digest realm="x"', r"h wants to be asked by 'Digest'; known are Basic, and Bearer with a realm"),
        ("Bearer", r"h wants to be asked by 'Bearer'"),
        ('Bearer realm="ftp://x/"', r"known are Basic, and Bearer with a realm"),
        ('Bearer realm="http://tokens.example/"', r"an address without https; nothing is sent there"),
    ],
)
def test_a_challenge_that_is_not_followed(login: Login, challenge: str, told: str) -> None:
    login("h", {"auth": SECRET})
    with pytest.raises(SourceDenied, match=told):
        authorization(challenge, "h", HttpClient(), scope="repository:x:pull")


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b"no json", b'{"token": 7}', b'{"token": "a b"}', b'{"token": "a\\nb"}']
)
def test_a_token_service_that_answers_nonsense(login: Login, body: bytes) -> None:
    with serving(lambda *_: body) as realm:
        challenge = f'Bearer realm="{realm}",service="s"'
        with pytest.raises(SourceError, match=r"the token of h: 127\.0\.0\.1 answered without one"):
            authorization(challenge, "h", HttpClient(), scope="repository:x:pull")


def test_what_docker_login_noted(login: Login, tmp_path: Path) -> None:
    assert docker_credentials("h") is None
    login("https://h", {"auth": SECRET})
    assert docker_credentials("h") == SECRET
    login("h", {})
    with pytest.raises(SourceDenied, match=r"leaves the password of h to a credential helper"):
        docker_credentials("h")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceDenied, match=r"config.json cannot be read"):
        docker_credentials("h")
