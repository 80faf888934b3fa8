"""A proxy that breaks HTTP on purpose, between any client and any HTTP/1.1 server (a web server, moto, Ceph).

Every request is forwarded as it came, ``Host`` included, so that signatures hold; the whole answer is read, a ``Fault``
rewrites it, and what is left is sent as the fault says. ``proxy.plan(request)`` picks the fault, or None for none.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """``number`` counts all requests of the proxy from 0, ``attempt`` those for the same path."""

    method: str
    path: str
    headers: dict[str, str]
    number: int
    attempt: int


@dataclass(frozen=True)
class Answer:
    """What goes back to the client.

    ``cut``: stop after so many bytes of it, headers included (``cut_body``: of the body alone); ``reset``: by RST, not
    FIN; ``pause_s``: after every ``piece_bytes`` (``head_pause_s``: after every byte of the headers); ``endless``:
    chunks of zeros follow until the client has enough.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None
    cut_body: int | None = None
    reset: bool = False
    pause_s: float = 0.0
    piece_bytes: int = 1 << 16
    head_pause_s: float = 0.0
    endless: bool = False

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {http.client.responses.get(self.status, '')}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def with_header(self, name: str, value: str | None) -> Answer:
        headers = {key: old for key, old in self.headers.items() if key.lower() != name.lower()}
        return replace(self, headers=headers if value is None else {**headers, name: value})

    def with_body(self, body: bytes) -> Answer:
        return replace(self.with_header("Content-Length", str(len(body))), body=body)


Fault = Callable[[Answer], Answer]
Plan = Callable[[Request], "Fault | None"]


@dataclass
class Proxy:
    """``url``: give it to the client in place of the server's. ``seen``: all requests so far. ``drop``: request headers
    that do not get through. ``down``: nothing is forwarded, every connection is reset."""

    upstream: str
    plan: Plan = lambda _: None
    drop: frozenset[str] = frozenset()
    down: bool = False
    seen: list[Request] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, method: str, path: str, headers: dict[str, str]) -> Request:
        with self.lock:
            attempt = sum(request.path == path for request in self.seen)
            self.seen.append(Request(method, path, headers, len(self.seen), attempt))
            return self.seen[-1]

    def forward(self, request: Request, body: bytes) -> Answer:
        parts = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in self.drop | {"expect", "connection"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in _HOP}
        finally:
            connection.close()
        length = response.getheader("Content-Length") if request.method == "HEAD" else str(len(data))
        if length is not None:
            headers["Content-Length"] = length
        return Answer(response.status, headers, data)


_HOP = {"transfer-encoding", "connection", "content-length", "keep-alive"}


@contextmanager
def faulty(upstream: str, plan: Plan = lambda _: None, *, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """Run a proxy before ``upstream`` (``http://host:port``); with ``tls`` it speaks https to its clients."""
    proxy = Proxy(upstream, plan)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = proxy.note(self.command, self.path, dict(self.headers.items()))
            if proxy.down:
                self.close_connection = True
                _reset(self)
                return
            fault = proxy.plan(request)
            answer = proxy.forward(request, body)
            _send(self, answer if fault is None else fault(answer))

        def log_message(self, *_: object) -> None:
            pass

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.handle_one)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that was killed resets its connection; nothing to report."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    proxy.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def _send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    head = answer.head()
    data = head + (b"" if handler.command == "HEAD" else answer.body)
    cut = answer.cut if answer.cut_body is None else len(head) + answer.cut_body
    if cut is not None:
        data = data[: cut if cut >= 0 else len(data) + cut]
    try:
        if answer.head_pause_s:
            for byte in data[: len(head)]:
                handler.wfile.write(bytes([byte]))
                time.sleep(answer.head_pause_s)
            data = data[len(head) :]
        for start in range(0, len(data), answer.piece_bytes):
            handler.wfile.write(data[start : start + answer.piece_bytes])
            handler.wfile.flush()
            time.sleep(answer.pause_s)
        while answer.endless:
            handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
    except OSError:
        handler.close_connection = True  # the client had enough
        return
    if cut is not None:
        handler.close_connection = True
        if answer.reset:
            _reset(handler)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def refuse(status: int, code: str = "", headers: dict[str, str] | None = None) -> Fault:
    """Another status, with S3's XML for ``code``; the server's work is done all the same (*forward and then fail*)."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return lambda _: Answer(status, {**(headers or {})}, b"").with_body(body)


def cut_head(at: int, *, reset: bool) -> Fault:
    """Stop within the headers."""
    return lambda answer: replace(answer, cut=at, reset=reset)


def cut_body(at: int, *, reset: bool) -> Fault:
    """Stop after ``at`` bytes of the body; a negative one counts from its end."""
    return lambda answer: replace(answer, cut_body=at if at >= 0 else len(answer.body) + at, reset=reset)


def flip(at: int) -> Fault:
    """One bit of the body turned over."""

    def fault(answer: Answer) -> Answer:
        body = bytearray(answer.body)
        body[at] ^= 0x10
        return replace(answer, body=bytes(body))

    return fault


def header(name: str, value: str | None) -> Fault:
    """One header set or, with None, left out."""
    return lambda answer: answer.with_header(name, value)


def body(data: bytes) -> Fault:
    """Other bytes under the same status."""
    return lambda answer: answer.with_body(data)


def trickle(piece_bytes: int, pause_s: float) -> Fault:
    """A few bytes at a time."""
    return lambda answer: replace(answer, piece_bytes=piece_bytes, pause_s=pause_s)


def drip_head(pause_s: float) -> Fault:
    """The headers one byte at a time."""
    return lambda answer: replace(answer, head_pause_s=pause_s)


def endless() -> Fault:
    """Chunk upon chunk of zeros, and no end."""
    chunked = ("Transfer-Encoding", "chunked")
    return lambda answer: replace(
        answer.with_header("Content-Length", None).with_header(*chunked), body=b"", endless=True
    )
