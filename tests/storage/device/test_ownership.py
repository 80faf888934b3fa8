"""Files that are not ours: a cache takes no folder of somebody else, and deletes only names of its own exact shape."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.device import Device, Event, StoreSource
from storage.device.errors import NotInstalled, NotOurs
from storage.errors import BadStoreURI
from storage.layout import CACHE_MARKER
from storage.registry import Registry
from storage.retention import delete_version, gc
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from tests.storage.device.artifacts import publish

HEX = "5" * 64
LOOKALIKES = [
    "staging/thesis.txt",
    "staging/thesis.part",
    f"staging/{HEX}.txt",
    f"staging/{HEX[:-1]}.part",
    f"staging/{HEX.replace('5', 'A')}.part",
    f"staging/deep/{HEX}.part",
    "models/my/manifests/k8s.json",
    f"models/my/manifests/{HEX}.yaml",
    f"models/my/manifests/more/{HEX}.json",
    f"models/My/manifests/{HEX}.json",
    f"models/con/manifests/{HEX}.json",
    f"models/net/{HEX}.json",
    "blobs/sha256/aa/x",
    f"blobs/sha256/aa/{HEX}",
    f"blobs/sha256/55/{HEX}.bak",
    f"blobs/sha256/{HEX}",
    f"blobs/md5/55/{HEX}",
    "trust/notes.txt",
    "diary.txt",
]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    publish(store, version=1)
    publish(store, version=2, fresh=[0])
    return store


@pytest.fixture
def device(tmp_path: Path, store: LocalStore) -> Device:
    return Device(tmp_path / "cache", StoreSource(store), unsigned=True)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Return every file below a folder with its bytes, every link with its target, every folder as such."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = f"-> {os.readlink(path)}" if path.is_symlink() else "/" if path.is_dir() else path.read_bytes()
    return found


def plant(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")


def everything(device: Device) -> list[Callable[[], object]]:
    return [
        lambda: device.pull("net", "1"),
        lambda: device.upgrade("net"),
        lambda: device.pull("net", "2"),
        lambda: device.rollback("net"),
        lambda: device.verify("net", discard=True),
        lambda: device.downgrade("net"),
        lambda: device.remove("net"),
    ]


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_folder_with_files_of_others_is_refused_and_stays(device: Device, name: str) -> None:
    folder = Path(device.root)
    plant(folder, [name])
    before = tree(folder)
    with pytest.raises(NotOurs, match=r"cache: neither empty nor a cache \(it holds .*\); choose an empty folder"):
        device.pull("net")
    for call in everything(device)[1:]:
        with pytest.raises((NotOurs, NotInstalled)):
            call()
    assert tree(folder) == before


def test_files_that_look_like_ours_stay_in_a_cache(device: Device) -> None:
    folder = Path(device.root)
    device.pull("net", "1")
    plant(folder, LOOKALIKES)
    for call in everything(device):
        call()
    assert {name for name in LOOKALIKES if (folder / name).read_text() == f"mine: {name}"} == set(LOOKALIKES)
    assert not list(folder.glob("models/net/state.json"))
    assert [name for name in tree(folder) if name.startswith("blobs/") and (folder / name).is_file()] == sorted(
        name for name in LOOKALIKES if name.startswith("blobs/")
    )


def test_a_store_is_no_cache(store: LocalStore) -> None:
    before = tree(store.root)
    device = Device(store.root, StoreSource(store), unsigned=True)
    for call in everything(device):
        with pytest.raises((NotOurs, NotInstalled)) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(NotOurs, match="a store is published here"):
        Device(store.root, StoreSource(MemoryStore()), unsigned=True).pull("net")
    # neither with a marker that got there by a copy
    (store.root / CACHE_MARKER).write_bytes(b"")
    for call in everything(device):
        with pytest.raises((NotOurs, NotInstalled)):
            call()
    (store.root / CACHE_MARKER).unlink()
    assert tree(store.root) == before


def test_a_store_with_nothing_published_yet_is_no_cache(tmp_path: Path, store: LocalStore) -> None:
    """A job that was killed before its first version: blobs alone."""
    half = LocalStore(tmp_path / "half")
    Registry(half).put_blob(b"shard", "x")
    for extra in (half.root / ".tmp", half.root / "blobs"):  # with the folder of temporary files, and without
        before = tree(half.root)
        with pytest.raises(NotOurs):
            Device(half.root, StoreSource(store), unsigned=True).pull("net")
        assert tree(half.root) == before
        if extra.name == ".tmp":
            for path in extra.iterdir():
                path.unlink()
            extra.rmdir()


def test_the_folder_that_is_pulled_from_is_not_claimed(tmp_path: Path) -> None:
    empty = LocalStore(tmp_path / "both")
    empty.root.mkdir()
    with pytest.raises(NotOurs, match="the store that is pulled from"):
        Device(empty.root, StoreSource(empty), unsigned=True).pull("net")
    assert tree(empty.root) == {}
    publish(empty)


def test_a_cache_is_no_store(device: Device, store: LocalStore) -> None:
    device.pull("net", "1")
    for marked in (True, False):
        if not marked:
            (Path(device.root) / CACHE_MARKER).unlink()
        before = tree(Path(device.root))
        writes: list[Callable[[LocalStore], object]] = [
            publish,
            lambda cache: Registry(cache).put_blob(b"x", "x"),
            lambda cache: cache.put_file("a", store.root / "models/net/tags/latest.json"),
            lambda cache: cache.put_if_match("a", b"", etag="x"),
            lambda cache: cache.delete(next(iter(cache.list("blobs/"))).key),
            lambda cache: gc(cache, grace_s=0, dry_run=False),
        ]
        for write in writes:
            with pytest.raises(BadStoreURI, match=r"cache is a device's cache .*; give the store a folder of its own"):
                write(LocalStore(Path(device.root)))
        with pytest.raises(Exception, match="no version 1"):
            delete_version(LocalStore(Path(device.root)), "net", 1)
        assert tree(Path(device.root)) == before


def test_an_old_cache_without_a_marker_is_adopted(device: Device) -> None:
    folder = Path(device.root)
    for before in ([], everything(device)[:1], everything(device)[:4]):
        for call in before:
            call()
        if before:
            (folder / CACHE_MARKER).unlink()
        device.pull("net", "2")
        assert (folder / CACHE_MARKER).is_file()
        assert device.verify("net").whole


def test_what_a_killed_first_pull_left_is_adopted(device: Device) -> None:
    folder = Path(device.root)
    folder.mkdir()
    (folder / "lock").write_bytes(b"")
    device.pull("net")
    (folder / CACHE_MARKER).unlink()
    (folder / "staging").mkdir(exist_ok=True)
    (folder / f"staging/{HEX}.part").write_bytes(b"half")
    device.pull("net")
    assert not (folder / f"staging/{HEX}.part").exists()


def test_a_volume_of_its_own_may_be_a_cache(device: Device) -> None:
    (Path(device.root) / "lost+found").mkdir(parents=True)
    device.pull("net")
    assert (Path(device.root) / "lost+found").is_dir()


@pytest.mark.parametrize("link", ["staging", "blobs", "blobs/sha256", "models", "models/net", "models/net/manifests"])
def test_links_are_never_followed(device: Device, tmp_path: Path, link: str) -> None:
    """A folder of ours that somebody put elsewhere and linked: nothing behind the link is touched."""
    device.pull("net", "1")
    device.upgrade("net")
    folder, elsewhere = Path(device.root), tmp_path / "elsewhere"
    for path in list(folder.glob("staging/*")):
        path.unlink()
    if (folder / link).exists():
        (folder / link).rename(elsewhere)
    else:
        elsewhere.mkdir()
    plant(elsewhere, [f"{HEX}.part", f"{HEX}.json", f"sha256/55/{HEX}", f"55/{HEX}", HEX, f"manifests/{HEX}.json"])
    (folder / link).symlink_to(elsewhere)
    before = tree(elsewhere)
    for call in everything(device):
        with contextlib.suppress(NotOurs, NotInstalled):
            call()
    assert tree(elsewhere) == before
    assert (folder / link).is_symlink()


@pytest.mark.parametrize("link", ["staging", "blobs", "models"])
def test_a_link_in_the_way_is_named(device: Device, tmp_path: Path, link: str) -> None:
    device.pull("net", "1")
    folder = Path(device.root)
    if (folder / link).exists():
        (folder / link).rename(tmp_path / "elsewhere")
    (folder / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotOurs, match=rf"cache/{link}: a link where a cache has a folder"):
        device.pull("net", "2")


def test_the_cache_itself_may_be_a_link(device: Device, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    Path(device.root).symlink_to(tmp_path / "disk")
    device.pull("net")
    assert device.verify("net").whole
    Path(device.root).unlink()
    Path(device.root).symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotOurs, match=r"cache: a link to .*nowhere', which is not there"):
        device.pull("net")


def test_what_is_not_ours_is_named_when_a_model_goes(device: Device) -> None:
    device.pull("net", "1")
    note = Path(device.root) / "models/net/notes.txt"
    note.write_text("mine")
    seen: list[Event] = []
    device.on_event = seen.append
    device.remove("net")
    assert [event.message for event in seen] == ["models/net: notes.txt is not ours and stays"]
    assert note.read_text() == "mine"
    with pytest.raises(NotInstalled, match="net is not in"):
        device.remove("net")
    device.pull("net", "1")


def test_commands_that_bring_nothing_claim_nothing(tmp_path: Path) -> None:
    device = Device(tmp_path / "cache")
    for call in everything(device)[1:2] + everything(device)[3:]:
        with pytest.raises(NotInstalled, match="net is not in"):
            call()
    assert not (tmp_path / "cache").exists()
