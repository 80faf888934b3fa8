"""The browser's page as anybody serves it: its files, the npm packages it names, and a store, from one folder."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "examples" / "web"


def install_page(folder: Path) -> Path:
    """Copy the page and install its npm packages; no npm or registry: skips, fails where CI=true."""
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("node_modules", "package-lock.json", "store"))
    npm = shutil.which("npm")
    reason = "no npm on the PATH (Debian: npm)"
    if npm is not None:
        words = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode == 0:
            return folder
        reason = f"npm install fails: {done.stderr[-300:]}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass
class PageServer:
    """A server on this machine. A path in ``barred`` waits until ``gate`` is set; ``damaged`` ones lose a bit."""

    address: str = ""
    barred: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)
    paths: list[str] = field(default_factory=list)


@contextmanager
def serving(folder: Path) -> Iterator[PageServer]:
    """Serve a folder."""
    state = PageServer()

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *words: object) -> None:  # noqa: A002
            pass

        def end_headers(self) -> None:  # pages and workers alike: nothing is asked of any other address
            self.send_header(
                "Content-Security-Policy", "connect-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:"
            )
            super().end_headers()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            state.paths.append(path)
            if path in state.barred:
                state.gate.wait(60)
            if path not in state.damaged:
                super().do_GET()
                return
            raw = bytearray(Path(self.translate_path(path)).read_bytes())
            raw[-1] ^= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    Handler.extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        state.gate.set()
        server.shutdown()
        server.server_close()
