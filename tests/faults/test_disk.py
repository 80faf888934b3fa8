"""The device's own disk, full or unwritable: a clear error, the version in use untouched, and nothing half-named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.device import Device, Event, StoreSource
from storage.device.errors import CacheError, NoSpace
from storage.stores.local import LocalStore
from tests.conftest import ROOT
from tests.storage.device.artifacts import publish


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


def test_too_little_space_is_said_before_anything_moves(tmp_path: Path, small_disk: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store, groups=4, shard_bytes=400_000)
    device = Device(small_disk, StoreSource(store), unsigned=True)
    with pytest.raises(NoSpace, match=r"1605600 bytes to come, \d+ free in .*small; free space or downgrade"):
        device.pull("net")
    assert not list(small_disk.glob("blobs/*/*/*"))


def test_a_disk_that_fills_up_in_mid_shard(tmp_path: Path, small_disk: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store, groups=1, shard_bytes=100_000)
    device = Device(small_disk, StoreSource(store), unsigned=True)
    device.pull("net")
    publish(store, version=2, groups=2, shard_bytes=300_000, fresh=[0, 1])
    filler = small_disk / "filler"

    def fill(event: Event) -> None:
        if not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 150_000))

    device.on_event = fill
    with pytest.raises(NoSpace, match="No space left on device; free space or downgrade a model, then run again"):
        device.pull("net")
    filler.unlink()
    device.on_event = lambda _: None
    assert device.status("net").state.current is not None
    assert device.verify("net").whole
    assert device.manifest("net").version == 1
    assert device.pull("net").version == 2
    assert device.verify("net").whole


LIMITED = """
import resource, sys
from storage.device import Device, StoreSource
from storage.device.errors import NoSpace
from storage.stores.local import LocalStore
resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))
try:
    Device(sys.argv[1], StoreSource(LocalStore(sys.argv[2])), unsigned=True).pull("net")
except NoSpace as error:
    print(error)
"""


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    manifest, _ = publish(LocalStore(tmp_path / "store"), groups=2, shard_bytes=150_000)
    argv = [sys.executable, "-c", LIMITED, str(tmp_path / "cache"), str(tmp_path / "store")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "File too large; free space or downgrade a model" in done.stdout
    assert [path.name for path in tmp_path.glob("cache/blobs/*/*/*")] == [manifest.base[0].digest[7:]]
    assert not list(tmp_path.glob("cache/staging/*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    with pytest.raises(CacheError, match="Permission denied"):
        Device(folder, StoreSource(LocalStore(tmp_path / "store")), unsigned=True).pull("net")


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheError, match="cache: a file; a cache is a folder"):
        Device(tmp_path / "cache", StoreSource(LocalStore(tmp_path / "store")), unsigned=True).pull("net")


def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store)
    device = Device(tmp_path / "cache", StoreSource(store), unsigned=True)
    device.pull("net")
    state = tmp_path / "cache/models/net/state.json"
    state.write_bytes(b'{"current":')
    with pytest.raises(CacheError, match=r"state\.json is not a state file; delete the model's folder and pull again"):
        device.pull("net")


def test_a_damaged_manifest_of_another_model_frees_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store, "one")
    publish(store, "two", fresh=[0])
    device = Device(tmp_path / "cache", StoreSource(store), unsigned=True)
    device.pull("one")
    (manifest,) = (tmp_path / "cache/models/one/manifests").iterdir()
    right = manifest.read_bytes()
    manifest.write_bytes(right[:-1])
    seen: list[Event] = []
    device.on_event = seen.append
    device.pull("two")
    assert device.verify("two").whole
    assert ["nothing was freed" in event.message for event in seen if event.kind == "warning"] == [True]
    with pytest.raises(CacheError, match="is damaged; pull one again"):
        device.upgrade("one")
    device.pull("one")
    assert manifest.read_bytes() == right
    device.upgrade("one")
    assert device.verify("one").whole
