"""Sources over HTTP: a base address, presigned URLs, and S3 through presigned URLs made on the spot.

One GET brings one blob. A resume asks ``Range: bytes=N-`` with ``If-Range`` and a strong entity tag (RFC 9110, 13.1.5
and 14.2) and believes no answer: range, entity tag and whole length are compared with what was asked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from storage.device.errors import SourceChanged, SourceDenied, SourceError, SourceNotFound
from storage.device.source import Body
from storage.document import parse_json
from storage.wording import without_secrets

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

_CHUNK_BYTES = 1 << 16
_REASON_BYTES = 2048
_MAX_REDIRECTS = 5
_MAX_SKEW_S = 300.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_REASON = re.compile(rb"<Code>([A-Za-z]{1,60})</Code>")


@dataclass(frozen=True)
class HttpClient:
    """GET with what a device needs: time-outs, few redirects and none from https to http, and errors of one line.

    ``headers`` (an ``Authorization``, say) go to the first host alone. Proxies come from the environment.
    ``answer_timeout_s`` bounds status and headers together, however slowly they drip.
    """

    headers: Mapping[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    answer_timeout_s: float = 60.0

    @cached_property
    def _pools(self) -> dict[str, PoolManager]:
        return {}

    @contextmanager
    def open(self, url: str, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        """Open ``url``; ``key`` is its name in errors, which never show the URL (it may carry a signature)."""
        from urllib3.exceptions import HTTPError, SSLError

        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if etag is not None:
                headers["If-Range"] = f'"{etag}"'
        host = _host(_parts(url, key))
        try:
            response = self._follow(url, key, headers)
        except SSLError as error:
            raise SourceError(f"{key}: {host} has no valid certificate: {_line(error)}", retryable=False) from error
        except HTTPError as error:
            raise SourceError(f"{key}: {host} does not answer: {_line(error)}") from error
        try:
            yield _body(response, key, start, etag)
        finally:
            response.close()

    def _follow(self, url: str, key: str, request_headers: dict[str, str]) -> BaseHTTPResponse:
        first = _parts(url, key)
        for _ in range(_MAX_REDIRECTS + 1):
            parts = _parts(url, key)
            if parts.scheme not in {"http", "https"} or not parts.hostname:
                raise SourceError(f"{key}: not an http(s) address", retryable=False)
            if first.scheme == "https" and parts.scheme != "https":
                raise SourceError(f"{key}: {_host(first)} redirects from https to {parts.scheme}", retryable=False)
            headers = {**self.headers, **request_headers} if parts.netloc == first.netloc else request_headers
            response = self._pool(parts.scheme).request(
                "GET", url, headers=headers, redirect=False, retries=False, preload_content=False, decode_content=False
            )
            location = response.get_redirect_location()
            if not location:
                return response
            response.close()
            url = _joined(url, location, key)
        raise SourceError(f"{key}: more than {_MAX_REDIRECTS} redirects from {_host(first)}", retryable=False)

    def _pool(self, scheme: str) -> PoolManager:
        if scheme not in self._pools:
            from urllib.request import getproxies

            from urllib3 import PoolManager, ProxyManager, Timeout

            from storage.device.deadline import impatient_pools

            timeout = Timeout(connect=self.connect_timeout_s, read=self.read_timeout_s)
            proxy = getproxies().get(scheme)
            pools = ProxyManager(proxy, timeout=timeout) if proxy else PoolManager(timeout=timeout)
            pools.pool_classes_by_scheme = impatient_pools(self.answer_timeout_s)
            self._pools[scheme] = pools
        return self._pools[scheme]


@dataclass(frozen=True)
class HttpSource:
    """The keys of a store under an address: a CDN, a web server over a local store, a public bucket."""

    base_url: str
    client: HttpClient = field(default_factory=HttpClient)

    @contextmanager
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        """Open ``<base_url>/<key>``."""
        url = f"{self.base_url.rstrip('/')}/{quote(key)}"
        with self.client.open(url, key, start=start, etag=etag) as body:
            yield body


@dataclass(frozen=True)
class PresignedSource:
    """A URL for every key. ``url_for(key, fresh)`` finds it; ``fresh``: the last one was refused, find a newer one."""

    url_for: Callable[[str, bool], str]
    client: HttpClient = field(default_factory=HttpClient)

    @contextmanager
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        """Open the key's URL; when that is refused, once more with a newer one."""
        with ExitStack() as stack:
            url = self.url_for(key, False)
            try:
                body = stack.enter_context(self.client.open(url, key, start=start, etag=etag))
            except SourceDenied as error:
                newer = self.url_for(key, True)
                if newer == url:
                    raise SourceDenied(f"{error}; has the URL expired? Get a new index") from error
                body = stack.enter_context(self.client.open(newer, key, start=start, etag=etag))
            yield body


@dataclass
class UrlIndex:
    """Presigned URLs by key, from ``{"urls": {key: url}}``. ``load`` reads it, and again when a URL was refused."""

    load: Callable[[], bytes]
    _urls: dict[str, str] | None = None

    def __call__(self, key: str, fresh: bool) -> str:
        """Return the URL of a key."""
        if self._urls is None or fresh:
            self._urls = self._read()
        if key not in self._urls:
            raise SourceNotFound(f"{key}: the index of presigned URLs does not name it")
        return self._urls[key]

    def _read(self) -> dict[str, str]:
        try:
            document = parse_json(self.load())
        except ValueError as error:
            raise SourceError(f"the index of presigned URLs is not JSON: {error}", retryable=False) from error
        urls = document.get("urls") if isinstance(document, dict) else None
        if not isinstance(urls, dict) or not all(isinstance(url, str) for url in urls.values()):
            raise SourceError('the index of presigned URLs is not {"urls": {key: url}}', retryable=False)
        return urls


def _body(response: BaseHTTPResponse, key: str, start: int, etag: str | None) -> Body:
    if response.status not in {200, 206}:
        raise _refusal(response, key, start)
    if (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise SourceError(f"{key}: the server sent it as {encoding}, which was not asked for", retryable=False)
    tag = response.headers.get("ETag", "")
    # A weak tag does not tell bytes apart.
    strong = tag[1:-1] if len(tag) > 2 and tag[0] == tag[-1] == '"' else None
    begin, total = 0, _number(response.headers.get("Content-Length"))
    if total is None and "chunked" not in response.headers.get("Transfer-Encoding", "").lower():
        raise SourceError(f"{key}: the answer does not say where it ends; its headers may have been cut")
    if response.status == 206:
        begin, total = _ranged(response.headers.get("Content-Range", ""), key, start)
        if etag is not None and strong is not None and strong != etag:
            raise SourceChanged(f"{key}: its entity tag was {etag} and is {strong}")
    return Body(begin, total, strong, _chunks(response, key))


def _ranged(content_range: str, key: str, start: int) -> tuple[int, int | None]:
    match = _CONTENT_RANGE.fullmatch(content_range)
    if not start or match is None or int(match[1]) != start:
        extent = f"from byte {start}" if start else "all of it"
        raise SourceError(f"{key}: asked for {extent}, the server sent Content-Range {content_range[:80]!r}")
    return start, None if match[3] == "*" else int(match[3])


def _refusal(response: BaseHTTPResponse, key: str, start: int) -> SourceError:
    code = _REASON.search(_reason(response))
    said = f"{key}: HTTP {response.status}{f' {code[1].decode()}' if code else ''}"
    if response.status in {404, 410}:
        return SourceNotFound(said)
    if response.status in {401, 403}:
        challenge = response.headers.get("WWW-Authenticate")
        return SourceDenied(f"{said}{_skew(response.headers.get('Date'))}", challenge=challenge)
    if response.status == 416:
        content_range = response.headers.get("Content-Range", "")[:80]
        return SourceChanged(f"{said}: nothing from byte {start} on (Content-Range {content_range!r})")
    again = response.status in {408, 425, 429} or response.status >= 500
    return SourceError(said, retryable=again, retry_after_s=_retry_after_s(response.headers.get("Retry-After")))


def _reason(response: BaseHTTPResponse) -> bytes:
    from urllib3.exceptions import HTTPError

    try:
        return response.read1(_REASON_BYTES)
    except (HTTPError, OSError):
        return b""  # the status is the error; its explanation may be missing


def _chunks(response: BaseHTTPResponse, key: str) -> Iterator[bytes]:
    from urllib3.exceptions import HTTPError

    try:
        while chunk := response.read1(_CHUNK_BYTES):
            yield chunk
    except (HTTPError, OSError) as error:
        raise SourceError(f"{key}: the connection broke: {_line(error)}") from error


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,19}", text) else None


def _retry_after_s(text: str | None) -> float | None:
    if (seconds := _number(text)) is not None:
        return float(seconds)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time()) if text else None
    except (ValueError, OverflowError, TypeError):
        return None


def _parts(url: str, key: str) -> SplitResult:
    """Split an address, or say that it is none, without a word of it: it may carry a signature or a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SourceError(f"{key}: not an http(s) address ({_reason_of(error)})", retryable=False) from error
    return parts


def _host(parts: SplitResult) -> str:
    """Return host and port, as they may be shown."""
    host = parts.hostname or "?"
    return host if parts.port is None else f"{host}:{parts.port}"


def _joined(url: str, location: str, key: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise SourceError(f"{key}: redirected to what is no address ({_reason_of(error)})", retryable=False) from error


def _reason_of(error: ValueError) -> str:
    return "brackets or host" if "IPv6" in str(error) or "netloc" in str(error) else "its port"


def _skew(date: str | None) -> str:
    """Say so when the server's clock and ours differ enough to void a signature."""
    try:
        skew_s = time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
    except (ValueError, OverflowError, TypeError):
        return ""
    return f"; this machine's clock is {skew_s:+.0f} s off the server's: set it" if abs(skew_s) > _MAX_SKEW_S else ""


def _line(error: Exception) -> str:
    return without_secrets(re.sub(r"\?[^\s'\")]+", "?...", " ".join(str(error).split())))[:200]
