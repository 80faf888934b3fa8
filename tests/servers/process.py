"""Start a server as a child that dies with the test session, however that ends."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class ServerFailed(Exception):
    """A server that is installed did not come up; the message ends with the end of its log."""


def find_program(name: str) -> str | None:
    """Return a program's path: beside this Python (a package brought it) or on PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(argv: Sequence[str], log: Path, *, grace_s: float = 3.0) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in the foreground.

    The kernel kills it if this process dies first (``prctl(2)``, PR_SET_PDEATHSIG).
    """
    tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    with log.open("ab") as output:
        process = subprocess.Popen([*tied, *argv], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path, *, timeout_s: float = 60.0) -> None:
    """Return once the server accepts connections; raise `ServerFailed` where it ends or takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise ServerFailed(f"{log.stem} ended with {process.returncode}: {tail(log)}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise ServerFailed(f"{log.stem} does not listen on port {port} after {timeout_s:.0f} s: {tail(log)}")


def tail(log: Path, lines: int = 5) -> str:
    """Return the last lines of a log as one."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "no log"
