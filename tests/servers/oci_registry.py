"""An OCI registry of its own: Debian's ``docker-registry`` (distribution 2.8) on a free port, in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.process import find_program, free_port, running, wait_for_port


@contextmanager
def oci(folder: Path, auth: str = "") -> Iterator[str]:
    """Run a registry and yield its ``host:port``; ``auth`` is a line of its configuration."""
    program = find_program("docker-registry")
    assert program
    port, log, config = free_port(), folder / "registry.log", folder / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: warn}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', secret: test}}\n"
        f"{auth}\n"
    )
    with running([program, "serve", str(config)], log) as process:
        wait_for_port(port, process, log)
        yield f"127.0.0.1:{port}"
