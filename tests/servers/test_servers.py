"""A server dies with its session, also when that is killed."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers.process import find_program


def test_a_server_dies_with_a_killed_session(tmp_path: Path) -> None:
    if find_program("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed")
    code = f"""
import sys, time
from pathlib import Path
from tests.servers.process import free_port, running, wait_for_port
port = free_port()
log = Path({str(tmp_path / "server.log")!r})
with running([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)], log) as process:
    wait_for_port(port, process, log)
    print(port, flush=True)
    time.sleep(60)
"""
    root = Path(__file__).resolve().parents[2]
    session = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, text=True)
    assert session.stdout
    port = int(session.stdout.readline())
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    session.send_signal(signal.SIGKILL)
    session.wait()
    session.stdout.close()
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived the session that started it")
