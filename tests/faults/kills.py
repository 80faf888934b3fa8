"""Kills a device at a chosen point, again and again: a forked child runs an operation and ends itself by SIGKILL.

A point is a number of bytes received, or the n-th operation on the cache's files (open, rename, remove, mkdir, fsync).
Run as a script, because forking wants a process without threads; prints one JSON object.

    python -m tests.faults.kills STORE CACHE_FOLDER OPERATION STRIDE_BYTES
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from storage.device import Device, StoreSource
from storage.device.source import Body
from storage.stores.local import LocalStore
from tests.faults.disks import fill

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
OPERATIONS: dict[str, tuple[str, ...]] = {
    # operation under test -> what comes before it
    "pull": (),
    "upgrade": ("pull",),
    "update": ("pull", "upgrade"),
    "update, by delta": ("pull", "upgrade"),
    "downgrade": ("pull", "upgrade"),
    "rollback": ("pull", "upgrade", "update"),
    "remove": ("pull", "upgrade"),
    # with no byte left on the disk: what frees space must not need any
    "downgrade, disk full": ("pull", "upgrade"),
    "remove, disk full": ("pull", "upgrade"),
}


class Broken(Exception):
    """A promise that did not hold."""


@dataclass
class Killer:
    """Counts bytes and file operations; ends the process at the chosen one. The counts outlive it in shared memory."""

    shared: mmap.mmap
    at_bytes: int = -1
    at_event: int = -1

    def bytes(self, count: int) -> None:
        self._write(0, self.read(0) + count)

    def event(self) -> None:
        if self.read(1) == self.at_event:
            os.kill(os.getpid(), signal.SIGKILL)
        self._write(1, self.read(1) + 1)

    def read(self, slot: int) -> int:
        return int(struct.unpack_from("q", self.shared, 8 * slot)[0])

    def _write(self, slot: int, value: int) -> None:
        struct.pack_into("q", self.shared, 8 * slot, value)

    def reset(self) -> None:
        self._write(0, 0)
        self._write(1, 0)


@dataclass(frozen=True)
class CountedSource:
    """Passes bytes on and kills when the chosen number has been handed over and written."""

    inner: StoreSource
    killer: Killer

    @contextmanager
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        with self.inner.open(key, start=start, etag=etag) as body:
            yield replace(body, chunks=self._chunks(body.chunks)) if key.startswith("blobs/") else body

    def _chunks(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            before = self.killer.read(0)
            left = self.killer.at_bytes - before
            if 0 <= left <= len(chunk):
                if left:
                    self.killer.bytes(left)
                    yield chunk[:left]
                os.kill(os.getpid(), signal.SIGKILL)
            self.killer.bytes(len(chunk))
            yield chunk


def perform(device: Device, operation: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "pull": lambda: device.pull("net", "1"),
        "upgrade": lambda: device.upgrade("net"),
        "update": lambda: device.pull("net", "2"),
        "downgrade": lambda: device.downgrade("net"),
        "rollback": lambda: device.rollback("net"),
        "remove": lambda: device.remove("net"),
    }
    calls[operation.partition(",")[0]]()


def killed(device: Device, killer: Killer, operation: str) -> bool:
    """Run the operation in a child; tell whether it was killed."""
    pid = os.fork()
    if pid == 0:
        root = str(device.root)

        def audit(event: str, arguments: tuple[object, ...]) -> None:
            if event in EVENTS and arguments and root in str(arguments[0]):
                killer.event()

        real_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            killer.event()
            real_fsync(descriptor)

        os.fsync = fsync
        sys.addaudithook(audit)
        try:
            perform(device, operation)
            os._exit(0)
        except BaseException as error:
            print(f"{operation}: {error!r}", file=sys.stderr)
            os._exit(9)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise Broken(f"{operation} failed by itself")
    return os.WIFSIGNALED(status)


def check(device: Device, *, done: bool, full: bool = False) -> None:
    """Whatever happened: a blob's name is its digest, and what is in use is whole; when done, nothing is left over.

    On a full disk low shards may be gone before the state says so: then the model runs part-bit.
    """
    for path in Path(device.root).glob("blobs/sha256/*/*"):
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
            raise Broken(f"wrong bytes under {path}")
    if device.status("net").state.current is not None and not (seen := device.verify("net")).whole:
        runs = device.levels("net")[:1] == (0,) and all(line.endswith(": missing") for line in seen.damaged)
        if done or not (full and runs):
            raise Broken(f"version in use: {seen.damaged}")
    if done and list(Path(device.root).glob("staging/*")):
        raise Broken("staged bytes are left")


def settle(device: Device, operation: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    """Run the operation again, as a device would, and compare with an undisturbed one."""
    status = device.status("net")
    here = (status.state.current.version, status.state.current.level) if status.state.current else (0, 0)
    if here not in (before, after):
        raise Broken(f"{here} is neither {before} nor {after}")
    if operation != "rollback" and not (
        operation.startswith("remove") and not (Path(device.root) / "models/net").exists()
    ):
        perform(device, operation)
        status = device.status("net")
        here = (status.state.current.version, status.state.current.level) if status.state.current else (0, 0)
        if here != after:
            raise Broken(f"{here} after a second run, expected {after}")
    check(device, done=operation != "rollback")


def snapshot(device: Device) -> tuple[int, int]:
    current = device.status("net").state.current
    return (current.version, current.level) if current else (0, 0)


def main(store: str, folder: str, operation: str, stride: int) -> dict[str, int]:
    killer = Killer(mmap.mmap(-1, 16))
    work, ready, full = Path(folder) / "work", Path(folder) / "ready", operation.endswith("disk full")
    source = CountedSource(StoreSource(LocalStore(Path(store))), killer)
    prepared = Device(ready, source.inner, unsigned=True)
    for step in OPERATIONS[operation]:
        perform(prepared, step)
    before = snapshot(prepared)

    def fresh() -> Device:
        (Path(folder) / "filler").unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        if ready.exists():
            shutil.copytree(ready, work)
        if full:
            fill(Path(folder))
        killer.reset()
        return Device(work, source, unsigned=True)

    device = fresh()
    killed(device, killer, operation)
    total, events, after = killer.read(0), killer.read(1), snapshot(device)
    largest = max(blob.size_bytes for blob in prepared.resolve("net", "2").manifest.descriptors())
    points = [("bytes", n) for n in {*range(0, total + 1, stride), total}] + [("event", n) for n in range(events)]
    kills = twice = 0
    for kind, at in points:
        device = fresh()
        killer.at_bytes, killer.at_event = (at, -1) if kind == "bytes" else (-1, at)
        if killed(device, killer, operation):
            kills += 1
        killer.at_bytes = killer.at_event = -1
        check(device, done=False, full=full)
        settle(device, operation, before, after)
        if killer.read(0) > total + largest:
            raise Broken(f"{killer.read(0)} bytes moved for {total}, more than one shard twice")
        twice += killer.read(0) - total
    return {"points": len(points), "kills": kills, "bytes": total, "events": events, "bytes_twice": twice}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
