"""Who a device is to an OCI registry: an answer to the registry's challenge, by Docker's own rules.

A registry refuses once and says how it wants to be asked (RFC 9110, 11.6.1): ``Basic``, or ``Bearer`` with the address
of a token service (distribution.github.io/distribution/spec/auth/token). Large public registries want a token of
everyone, also where anyone may read. Credentials are those of ``docker login``: ``auths`` in
``$DOCKER_CONFIG/config.json``, by default ``~/.docker/config.json``. Credential helpers are not run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode, urlsplit

from storage.device.errors import SourceDenied, SourceError
from storage.device.http import HttpClient
from storage.device.source import Body, Documents
from storage.document import parse_json

_MAX_TOKEN_BYTES = 1 << 20
_MAX_CONFIG_BYTES = 1 << 20
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
LOCAL_HOSTS = ("localhost", "127.0.0.1")
"""Where plain http is taken."""


def docker_credentials(host: str) -> str | None:
    """Return ``user:password`` for a registry, base64 as the file holds it; None where nobody logged in.

    Raises:
        SourceDenied: the file cannot be read, or leaves the password to a helper.
    """
    folder = os.environ.get("DOCKER_CONFIG")
    path = (Path(folder) if folder else Path("~/.docker").expanduser()) / "config.json"
    try:
        with path.open("rb") as file:
            document = parse_json(file.read(_MAX_CONFIG_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SourceDenied(f"{path} cannot be read ({error}); it holds what 'docker login' wrote") from error
    fields = document if isinstance(document, dict) else {}
    auths = fields.get("auths")
    entries = auths if isinstance(auths, dict) else {}
    entry = next((entries[name] for name in (host, f"https://{host}", f"http://{host}") if name in entries), None)
    if isinstance(entry, dict) and isinstance(entry.get("auth"), str) and entry["auth"]:
        return str(entry["auth"])
    helpers = fields.get("credHelpers")
    if entry is not None or (isinstance(helpers, dict) and host in helpers):
        raise SourceDenied(
            f"{path} leaves the password of {host} to a credential helper, which a device does not run; write its "
            "'auth' (base64 of user:password) under 'auths'"
        )
    return None


def authorization(challenge: str, host: str, client: HttpClient, *, scope: str) -> str:
    """Return the header ``Authorization`` that answers a registry's challenge.

    Args:
        challenge: what stood in ``WWW-Authenticate``.
        host: the registry, as credentials are filed.
        client: asks the token service.
        scope: what for, where the challenge does not say: ``repository:<name>:pull``.

    Raises:
        SourceDenied: nobody logged in where somebody must, or another scheme is wanted.
        SourceError: the token service does not answer, or not with a token.
    """
    scheme, _, rest = challenge.partition(" ")
    credentials = docker_credentials(host)
    if scheme.lower() == "basic":
        if credentials is None:
            raise SourceDenied(f"{host} wants a user and a password; 'docker login {host}' first")
        return f"Basic {credentials}"
    parameters = dict(_PARAMETER.findall(rest))
    realm = parameters.get("realm", "")
    parts = urlsplit(realm)
    if scheme.lower() != "bearer" or parts.scheme not in {"http", "https"} or not parts.hostname:
        raise SourceDenied(f"{host} wants to be asked by {scheme[:20]!r}; known are Basic, and Bearer with a realm")
    if parts.scheme == "http" and parts.hostname not in LOCAL_HOSTS:
        raise SourceDenied(f"{host} sends for its token to an address without https; nothing is sent there")
    query = {key: parameters[key] for key in ("service",) if key in parameters}
    query["scope"] = parameters.get("scope") or scope
    asking = replace(client, headers={} if credentials is None else {"Authorization": f"Basic {credentials}"})
    what, url = f"the token of {host}", f"{realm}{'&' if parts.query else '?'}{urlencode(query)}"
    try:
        raw = Documents(At(url, asking)).read(what, max_bytes=_MAX_TOKEN_BYTES)
    except SourceDenied as error:
        advice = (
            f"'docker login {host}' first" if credentials is None else "its password is not the one of 'docker login'"
        )
        raise SourceDenied(f"{error}: {advice}") from error
    try:
        document = parse_json(raw)
    except ValueError:
        document = None
    fields = document if isinstance(document, dict) else {}
    token = fields.get("token") or fields.get("access_token")
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise SourceError(f"{what}: {parts.hostname} answered without one", retryable=False)
    return f"Bearer {token}"


class Client(Protocol):
    """What opens addresses: an ``HttpClient``, or a ``RegistryClient``."""

    def open(self, url: str, key: str, *, start: int = 0, etag: str | None = None) -> AbstractContextManager[Body]:
        """Open ``url``; ``key`` is its name in errors."""
        ...


@dataclass(frozen=True)
class At:
    """One document at one address, whatever it is called."""

    url: str
    client: Client

    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> AbstractContextManager[Body]:
        """Open the document."""
        return self.client.open(self.url, key, start=start, etag=etag)


@dataclass
class RegistryClient:
    """GET from one repository; a refusal with a challenge is answered once for every request, as tokens end after some
    minutes.
    """

    host: str
    repository: str
    client: HttpClient
    _asking: HttpClient | None = field(default=None, repr=False)

    @contextmanager
    def open(self, url: str, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        """Open ``url``; ``key`` is its name in errors."""
        with ExitStack() as stack:
            try:
                body = stack.enter_context((self._asking or self.client).open(url, key, start=start, etag=etag))
            except SourceDenied as error:
                if error.challenge is None:
                    raise
                scope = f"repository:{self.repository}:pull"
                header = authorization(error.challenge, self.host, HttpClient(), scope=scope)
                self._asking = replace(self.client, headers={**self.client.headers, "Authorization": header})
                body = stack.enter_context(self._asking.open(url, key, start=start, etag=etag))
            yield body
