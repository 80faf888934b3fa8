"""kill -9 at any byte and any operation on the cache's files: right bytes in the end, one shard moved twice at most."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.device import Device, HttpSource
from storage.stores.local import LocalStore
from tests.conftest import ROOT
from tests.faults.conftest import Origin
from tests.faults.kills import OPERATIONS
from tests.storage.device import updates
from tests.storage.device.artifacts import publish

BY_DELTA = "update, by delta"


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of runs flush to it."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else tmp_path))
    yield folder
    shutil.rmtree(folder)


def run_kills(
    folder: Path, operation: str, stride_bytes: int, shard_bytes: int = 700, store: Path | None = None
) -> dict[str, int]:
    published = LocalStore(store or folder / "store")
    for version in (1, 2) if operation != BY_DELTA else ():
        publish(published, version=version, groups=2, shard_bytes=shard_bytes, base_bytes=shard_bytes, fresh=[0])
    argv = [
        sys.executable,
        "-m",
        "tests.faults.kills",
        str(published.root),
        str(folder),
        operation,
        str(stride_bytes),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures: dict[str, int] = json.loads(done.stdout)
    print(operation, figures)
    return figures


FULL = [operation for operation in OPERATIONS if operation.endswith("disk full")]


@pytest.mark.parametrize("operation", FULL)
def test_killed_while_a_full_disk_is_freed(tmp_path: Path, small_disk: Path, operation: str) -> None:
    figures = run_kills(small_disk, operation, stride_bytes=97, store=tmp_path / "store")
    assert figures["kills"] == figures["points"] - 1
    assert figures["events"] >= 10


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation not in (*FULL, BY_DELTA)])
def test_killed_at_enumerated_points(memory_folder: Path, operation: str) -> None:
    figures = run_kills(memory_folder, operation, stride_bytes=97)
    assert figures["kills"] == figures["points"] - (1 if figures["bytes"] == 0 else 0)
    assert figures["events"] >= 5
    assert (figures["bytes"] > 0) == (operation in {"pull", "upgrade", "update"})


def test_killed_at_200_points_of_an_update_by_delta(memory_folder: Path) -> None:
    """Among them each operation on a file; the update moves less than a tenth of the shards."""
    store = LocalStore(memory_folder / "store")
    updates.publish(store, 0)
    manifest = updates.publish(store, 1, sources=(1,))
    figures = run_kills(memory_folder, BY_DELTA, stride_bytes=9, store=store.root)
    assert figures["kills"] == figures["points"] >= 200
    assert figures["bytes"] == sum(delta.descriptor.size_bytes for delta in manifest.deltas)
    assert figures["bytes"] < sum(blob.size_bytes for blob in manifest.descriptors()) / 10


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["pull", "upgrade", "update"])
def test_killed_at_every_byte(memory_folder: Path, operation: str) -> None:
    figures = run_kills(memory_folder, operation, stride_bytes=1, shard_bytes=150)
    assert figures["kills"] == figures["points"] > figures["bytes"]


CHILD = """
import sys
from storage.device import Device, HttpSource
Device(sys.argv[1], HttpSource(sys.argv[2]), unsigned=True).pull("net", level=1)
"""


def test_killed_from_outside_while_it_pulls_over_http(origin: Origin, tmp_path: Path) -> None:
    """A real process, real sockets, and kills at random instants until it gets through."""
    manifest, _ = publish(origin.store, groups=8, shard_bytes=400_000)
    draw = random.Random(7)
    blobs = sum("blobs" in request.path for request in origin.proxy.seen)
    kills = 0
    for _ in range(6):
        before = len(origin.proxy.seen)
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "cache"), origin.url], cwd=ROOT)
        while child.poll() is None and len(origin.proxy.seen) < before + 4:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    device = Device(tmp_path / "cache", HttpSource(origin.url), unsigned=True)
    device.pull("net", level=1)
    assert device.verify("net").whole
    blobs = sum("blobs" in request.path for request in origin.proxy.seen)
    assert kills >= 1
    assert len(manifest.descriptors()) <= blobs <= len(manifest.descriptors()) + kills
