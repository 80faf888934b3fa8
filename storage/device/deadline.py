"""Connections that give a server so many seconds for its status and headers.

A time-out on a socket begins anew with every byte, so that a server which drips its headers holds a device for ever.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from typing_extensions import override
from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection


def impatient_pools(limit_s: float) -> dict[str, type[HTTPConnectionPool]]:
    """Return urllib3's pool classes by scheme, with connections that wait ``limit_s`` for status and headers."""

    class Connection(HTTPConnection):
        @override
        def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # urllib3's own signature
            with _hung_up_after(limit_s, self.sock):
                return super().getresponse()

    class SecureConnection(HTTPSConnection):
        @override
        def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # urllib3's own signature
            with _hung_up_after(limit_s, self.sock):
                return super().getresponse()

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    return {"http": Pool, "https": SecurePool}


@contextmanager
def _hung_up_after(limit_s: float, connected: socket.socket) -> Iterator[None]:
    def hang_up() -> None:
        with contextlib.suppress(OSError):  # it is closed already
            connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(limit_s, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
