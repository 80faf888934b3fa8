"""A Ray head with the Jobs API, in a process group of its own, that ends with the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_S = 180


@dataclass(frozen=True)
class RayHead:
    """The address of the Jobs API, that of the metrics, and the folder of the logs."""

    address: str
    metrics: str
    logs: Path


@contextmanager
def ray_head(num_cpus: int, auth_mode: str = "disabled") -> Iterator[RayHead]:
    """Start a head; sockets want a short path, so its files do not lie in tmp_path.

    With ``auth_mode`` "token" it takes the token that ``RAY_AUTH_TOKEN`` or the home folder holds.
    """
    folder = tempfile.mkdtemp(prefix="nq", dir="/tmp")
    gcs, dashboard, metrics, agent, environments = _free_ports(5)
    programs = Path(sys.executable).parent
    command = [
        *(str(programs / "ray"), "start", "--head", "--block", f"--num-cpus={num_cpus}", "--include-dashboard=true"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}", "--disable-usage-stats"),
        # The session's own Ray holds the default ports of a node's agents.
        *(f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}"),
        f"--runtime-env-agent-port={environments}",
    ]
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",  # a job's entrypoint says 'python'
        "RAY_AUTH_MODE": auth_mode,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_metrics_report_interval_ms": "500",
    }
    log = Path(folder) / "start.log"
    with log.open("wb") as stream:
        head = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        _await(f"http://127.0.0.1:{dashboard}/api/version", head, log)
        logs = Path(folder) / "session_latest" / "logs"
        yield RayHead(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", logs)
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _await(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + _START_S
    while time.monotonic() < give_up:
        if head.poll() is not None:
            raise RuntimeError(f"ray start ended with {head.returncode}: {log.read_text(errors='replace')[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError:  # it answers, and wants a token
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"no Jobs API at {url} after {_START_S} s: {log.read_text(errors='replace')[-2000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
