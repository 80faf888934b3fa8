"""What a pull installs is on the disk before the state names it: a power cut finds a whole version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.storage.artifacts import publish_new
from tests.storage.device.signed import Publisher


def test_what_a_pull_installs_is_flushed(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = publish_new(publisher.store)
    publisher.sign(versions=[version], tags={"latest": version})
    device = publisher.device(tmp_path / "device")
    real, flushed = os.fsync, list[tuple[int, int]]()

    def watched(descriptor: int) -> None:
        real(descriptor)
        seen = os.fstat(descriptor)
        flushed.append((seen.st_ino, seen.st_size))

    monkeypatch.setattr(os, "fsync", watched)
    device.pull("net")
    inodes = {inode for inode, _ in flushed}
    blobs = [path for path in (tmp_path / "device" / "blobs").rglob("*") if path.is_file()]
    assert len(blobs) >= 2
    for path in blobs:
        assert (path.stat().st_ino, path.stat().st_size) in flushed, path
        assert path.parent.stat().st_ino in inodes, path
    state = tmp_path / "device" / "models" / "net" / "state.json"
    assert (state.stat().st_ino, state.stat().st_size) in flushed
    assert state.parent.stat().st_ino in inodes
