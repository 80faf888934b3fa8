"""Links and pipes that somebody planted under our names, and the modes of what we make."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.device import Device, StoreSource
from storage.device.errors import CacheError, NotOurs
from storage.manifest import Manifest
from storage.stores.local import LocalStore
from tests.storage.device.artifacts import publish
from tests.storage.device.signed import Publisher


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def manifest(store: LocalStore) -> Manifest:
    return publish(store)[0]


@pytest.fixture
def device(tmp_path: Path, store: LocalStore, manifest: Manifest) -> Device:
    device = Device(tmp_path / "cache", StoreSource(store), unsigned=True)
    device.pull("net")
    return device


def names(manifest: Manifest, state: str) -> list[str]:
    """Return every name that an upgrade writes to."""
    low = manifest.groups[1].levels[1].digest[7:]
    return [
        f"staging/{low}.part",
        f"staging/{low}.etag",
        f"blobs/sha256/{low[:2]}/{low}",
        "models/net/state.json.new",
        "models/net/state.json",
        f"models/net/manifests/{state}.json",
        "lock",
    ]


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
@pytest.mark.parametrize("index", range(7))
def test_nothing_is_written_through_what_was_planted(
    device: Device, manifest: Manifest, tmp_path: Path, index: int, kind: str
) -> None:
    current = device.status("net").state.current
    assert current is not None
    name = names(manifest, current.digest[7:])[index]
    path, victim = Path(device.root) / name, tmp_path / "victim"
    if kind != "dangling link":
        victim.write_text("mine")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    match kind:
        case "link" | "dangling link":
            path.symlink_to(victim)
        case "hard link":
            path.hardlink_to(victim)
        case "pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()
    before = os.lstat(path)
    with contextlib.suppress(CacheError):
        device.upgrade("net")
    assert victim.exists() is (kind != "dangling link")
    assert kind == "dangling link" or victim.read_text() == "mine"
    # a second name of a file may be taken off it; what is no file of ours at all stays where it stands
    assert kind == "hard link" or os.lstat(path).st_ino == before.st_ino


def test_what_was_planted_is_named(device: Device, manifest: Manifest, tmp_path: Path) -> None:
    low = manifest.groups[0].levels[1].digest[7:]
    part = Path(device.root) / f"staging/{low}.part"
    (tmp_path / "thesis").write_text("mine")
    for plant, what in ((part.symlink_to, "a link"), (part.hardlink_to, "a second name of another file")):
        plant(tmp_path / "thesis")
        with pytest.raises(NotOurs) as caught:
            device.upgrade("net")
        assert str(
            caught.value
        ) == f"{part}: {what} where a cache has {'a file' if what == 'a link' else 'its own'}; " + (
            "remove it and try again"
        )
        part.unlink()
    assert device.upgrade("net").level == 1


TRUSTED = ["anchor.json", "models/net/timestamp.json", "models/net/targets.json", "models/net/root_history/1.root.json"]


@pytest.mark.parametrize("name", [*TRUSTED, "anchor.json.new", "models", "models/net", "models/net/root_history"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_trusted_metadata_follows_no_link(publisher: Publisher, tmp_path: Path, name: str, kind: str) -> None:
    publish(publisher.store)
    publisher.sign(tags={"latest": 1})
    device = publisher.device(tmp_path / "cache")
    device.pull("net")
    path, moved = Path(device.root) / "trust" / name, tmp_path / "moved"
    if path.exists():
        path.rename(moved)
    else:
        moved.write_text("mine")
        if name == "anchor.json.new":
            (path.parent / "anchor.json").unlink()
    before = moved.read_bytes() if moved.is_file() else sorted(one.name for one in moved.rglob("*"))
    path.symlink_to(moved) if kind == "link" else os.mkfifo(path)
    with pytest.raises(NotOurs, match=f"trust/{name}: a (link|pipe) where a cache has a (file|folder); remove it"):
        device.pull("net")
    assert before == (moved.read_bytes() if moved.is_file() else sorted(one.name for one in moved.rglob("*")))
    path.unlink()
    moved.rename(path) if name != "anchor.json.new" else None
    assert device.pull("net").signed


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize(("mask", "forbidden"), [(0, 0o022), (0o022, 0o022), (0o077, 0o077), (0o002, 0o022)])
def test_modes_let_nobody_else_write(
    publisher: Publisher, tmp_path: Path, umask: None, mask: int, forbidden: int
) -> None:
    """Under a umask of 0 as well; a stricter one is kept."""
    publish(publisher.store)
    publisher.sign(tags={"latest": 1})
    os.umask(mask)
    device = publisher.device(tmp_path / "cache")
    device.pull("net")
    device.upgrade("net")
    made = [Path(device.root), *(path for path in Path(device.root).rglob("*") if not path.is_symlink())]
    assert len(made) > 20
    assert [path for path in made if path.stat().st_mode & forbidden] == []
