"""The device's own disk, full or unwritable: a clear error, the version in use untouched, and nothing half-named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storage.device import Device, Event, StoreSource
from storage.device.cache import Installed, State
from storage.device.errors import CacheError, NoSpace, NotOurs
from storage.errors import InvalidManifest
from storage.layout import CACHE_MARKER
from storage.manifest import Manifest, canonical_json
from storage.stores.local import LocalStore
from tests.conftest import ROOT
from tests.faults.disks import fill
from tests.storage.device.artifacts import digest_of, publish


def test_too_little_space_is_said_before_anything_moves(tmp_path: Path, small_disk: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store, groups=4, shard_bytes=400_000)
    device = Device(small_disk, StoreSource(store), unsigned=True)
    with pytest.raises(NoSpace, match=r"1605600 bytes to come, \d+ free in .*small; free space, downgrade or"):
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
    with pytest.raises(
        NoSpace, match="No space left on device; free space, downgrade or remove a model, then run again"
    ):
        device.pull("net")
    filler.unlink()
    device.on_event = lambda _: None
    assert device.status("net").state.current is not None
    assert device.verify("net").whole
    assert device.manifest("net").version == 1
    assert device.pull("net").version == 2
    assert device.verify("net").whole


@pytest.fixture
def full(tmp_path: Path, small_disk: Path) -> Device:
    """Versions 1 and 2, full-bit, on a disk with no byte left."""
    store = LocalStore(tmp_path / "store")
    device = Device(small_disk / "cache", StoreSource(store), unsigned=True)
    for version in (1, 2):
        publish(store, version=version, groups=2, shard_bytes=50_000, fresh=[0])
        device.pull("net", level=1)
    fill(small_disk)
    return device


@pytest.mark.parametrize("marked", [True, False])
def test_a_full_disk_is_freed_by_downgrade(full: Device, small_disk: Path, marked: bool) -> None:
    if not marked:  # a cache of before there were markers
        (full.root / CACHE_MARKER).unlink()
    assert shutil.disk_usage(small_disk).free == 0
    freed = full.downgrade("net").freed_bytes
    assert freed == 50_001 + 50_001 + 50_101  # both versions' group 0, and group 1, which they share
    assert full.levels("net") == (0,)
    assert full.verify("net").whole
    assert full.rollback("net").version == 1
    (small_disk / "filler").unlink()
    assert full.upgrade("net").received_bytes == 100_102


def test_a_full_disk_is_freed_by_remove(full: Device, small_disk: Path) -> None:
    assert full.remove("net") == 5_000 + 3 * (50_000 + 50_001) + 200 - 100 + 100
    assert full.names() == []
    assert not list(full.root.glob("*/*/*/*"))


def test_what_is_under_way_goes_first(full: Device, small_disk: Path) -> None:
    """Nothing but staged bytes can be freed: a rollback takes them, and what it goes back to is whole."""
    (small_disk / "filler").unlink()
    full.downgrade("net")
    part = full.root / "staging" / f"{'5' * 64}.part"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(bytes(8192))
    fill(small_disk)
    assert full.rollback("net").version == 1
    assert full.verify("net").whole
    assert not part.exists()


def test_a_full_disk_that_nothing_frees_says_so(full: Device, small_disk: Path) -> None:
    (small_disk / "filler").unlink()
    full.downgrade("net")
    fill(small_disk)
    before = full.status("net")
    with pytest.raises(
        NoSpace, match="No space left on device; free space, downgrade or remove a model, then run again"
    ):
        full.rollback("net")
    assert full.status("net") == before
    assert full.pull("net").received_bytes == 0  # what is here needs no byte more
    assert not list(full.root.rglob("*.new"))


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
    assert "File too large; free space, downgrade or remove a model" in done.stdout
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


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    publish(store, "one")
    publish(store, "two", fresh=[0])
    return store


@pytest.fixture
def device(tmp_path: Path, store: LocalStore) -> Device:
    device = Device(tmp_path / "cache", StoreSource(store), unsigned=True)
    device.pull("one", level=1)
    return device


DEEP = b'{"a":' * 250 + b"1" + b"}" * 250
BROKEN = {
    "a state cut short": ("state.json", lambda raw: raw[:-1]),
    "an empty state": ("state.json", lambda _: b""),
    "a state nested deep": ("state.json", lambda _: DEEP),
    "a state of another model": ("state.json", lambda raw: raw.replace(b'"one"', b'"two"')),
    "a state with a key too many": ("state.json", lambda raw: raw.replace(b'"name"', b'"x":1,"name"')),
    "a state without end": ("state.json", lambda _: b" " * (2 << 20)),
    "a manifest cut short": ("manifests/*.json", lambda raw: raw[:-1]),
    "an empty manifest": ("manifests/*.json", lambda _: b""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_bad_model_stops_no_other(device: Device, store: LocalStore, case: str) -> None:
    """What it may need stays, all else is freed; it is named, and pulled again or removed."""
    where, damage = BROKEN[case]
    folder = Path(device.root)
    (path,) = folder.glob(f"models/one/{where}")
    right = path.read_bytes()
    path.write_bytes(damage(right))
    before = {path.name for path in folder.glob("blobs/*/*/*")}
    seen: list[Event] = []
    device.on_event = seen.append
    assert device.pull("two", level=1).freed_bytes == 0
    assert device.downgrade("two").freed_bytes == 50_001 + 50_101 + 50_201
    assert device.upgrade("two").received_bytes == 50_001 + 50_101 + 50_201
    assert device.remove("two") == 5_000 + 2 * (50_000 + 50_100 + 50_200) + 3
    assert device.names() == ["one"]
    warnings = [event.message for event in seen if event.kind == "warning"]
    assert len(warnings) == 4
    assert all(message.startswith("what one ") and str(path) in message for message in warnings)
    assert not any("\n" in message for message in warnings)
    shared = {shard.digest[7:] for group in device_manifest(store).groups[1:] for shard in group.levels}
    assert before - shared <= {path.name for path in folder.glob("blobs/*/*/*")}
    for call in (lambda: device.upgrade("one"), lambda: device.downgrade("one"), lambda: device.manifest("one")):
        with pytest.raises(CacheError, match=r"(pull one|remove one and pull it) again"):
            call()
    if where == "state.json":
        device.remove("one")
    device.pull("one", level=1)
    assert device.verify("one").whole
    seen.clear()
    device.remove("one")
    assert seen == []
    assert not list(folder.glob("blobs/*/*/*"))


def device_manifest(store: LocalStore) -> Manifest:
    return Device(Path("unused"), StoreSource(store), unsigned=True).resolve("two").manifest


def test_a_damaged_previous_manifest_stops_nothing_but_the_way_back(store: LocalStore, device: Device) -> None:
    before = device.status("one").state.current
    assert before is not None
    publish(store, "one", version=2, fresh=[0, 1])
    device.pull("one")
    path = Path(device.root) / f"models/one/manifests/{before.digest[7:]}.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match="is damaged; pull one again"):
        device.rollback("one")
    assert device.downgrade("one").level == 0
    assert device.upgrade("one").level == 1
    publish(store, "one", version=3, fresh=[0, 1])
    assert device.pull("one").version == 3
    assert device.rollback("one").version == 2
    assert not path.exists()


def test_what_an_older_edition_installed_unread_is_named_and_goes(device: Device) -> None:
    """A manifest nested 250 deep under its right digest, as editions without a limit of depth took it."""
    name, folder = "evil", Path(device.root) / "models/evil"
    document = json.loads(next((Path(device.root) / "models/one/manifests").iterdir()).read_bytes())
    document |= {"name": name, "recipe": json.loads(DEEP)}
    raw = canonical_json(document)
    installed = Installed(version=1, digest=digest_of(raw), level=0, signed=False)
    (folder / "manifests").mkdir(parents=True)
    (folder / f"manifests/{digest_of(raw)[7:]}.json").write_bytes(raw)
    (folder / "state.json").write_bytes(canonical_json(State(name=name, current=installed)))
    seen: list[Event] = []
    device.on_event = seen.append
    device.pull("two")
    device.downgrade("one")
    device.upgrade("one")
    device.remove("one")
    assert [event.message for event in seen if event.kind == "warning"] == [
        "what evil version 1 needs is unknown, so nothing that may be its own goes: manifest of evil version 1: "
        "not canonical JSON (nested more than 64 deep)"
    ] * 4
    (line,) = device.verify(name).damaged
    assert line.startswith("version 1: manifest of evil version 1: not canonical JSON")
    with pytest.raises(InvalidManifest, match="nested more than 64 deep"):
        device.upgrade(name)
    seen.clear()
    device.remove(name)
    device.pull("two")
    assert seen == [event for event in seen if event.kind != "warning"]


@pytest.mark.parametrize("name", ["UPPER", "con", "a b", "-"])
def test_a_stray_state_of_no_model_is_nobody(device: Device, name: str) -> None:
    stray = Path(device.root) / f"models/{name}/state.json"
    stray.parent.mkdir()
    stray.write_bytes(b"mine")
    device.pull("two")
    device.downgrade("one")
    device.remove("one")
    assert device.names() == ["two"]
    assert stray.read_bytes() == b"mine"


@pytest.mark.parametrize("where", ["models/one/state.json", "models/one/manifests/*.json", "lock"])
def test_a_pipe_does_not_make_a_device_wait(device: Device, where: str) -> None:
    (path,) = Path(device.root).glob(where)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(NotOurs, match="a pipe where a cache has a file; remove it and try again"):
        device.upgrade("one")
