"""Arbitrary things of others, in caches and in stores: whatever command runs, none is changed, moved or deleted.

Names are drawn from parts of our own, so that most look like ours; kinds are files, folders, links that lead outside,
and pipes. A regular file under an exact name of ours, in a folder marked as a cache, is the one thing taken for ours.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from storage.device import Device, StoreSource
from storage.errors import StorageError
from storage.layout import CACHE_MARKER
from storage.registry import Registry
from storage.retention import fsck, gc
from storage.stores.local import LocalStore
from tests.storage.device.artifacts import publish

KINDS = st.just("file") | st.sampled_from(["folder", "link to a file", "link to a folder", "dangling link", "pipe"])
HEX = "5" * 64
# Written once more on purpose: what may be deleted is a promise, not whatever the code takes for ours.
OURS = re.compile(
    r"lock|blobs/sha256/(..)(?<=[0-9a-f]{2})/\1[0-9a-f]{62}|staging/[0-9a-f]{64}\.(part|etag)"
    r"|models/[a-z0-9]([a-z0-9._-]*[a-z0-9])?/(state\.json|manifests/[0-9a-f]{64}\.json)(\.new)?"
    r"|trust/anchor\.json(\.new)?|trust/models/[a-z0-9]([a-z0-9._-]*[a-z0-9])?/(timestamp|snapshot|targets)\.json"
    r"|trust/models/[a-z0-9]([a-z0-9._-]*[a-z0-9])?/root_history/[0-9]+\.root\.json"
)
OUR_FOLDERS = re.compile(
    r"models/[a-z0-9]([a-z0-9._-]*[a-z0-9])?(/manifests)?"
)  # empty, they are what a killed removal leaves
WORDS = (
    *("blobs", "sha256", "staging", "models", "manifests", "trust", "root_history", "net", "other", "versions", "tags"),
    *("state.json", "state.json.new", "lock", "anchor.json", "timestamp.json", "00000001.json", "latest.json", "jobs"),
    *("thesis.txt", "UPPER", "con", "..x", " ", "\u00e4", ".tmp", "k8s.json", CACHE_MARKER),
)


@dataclass(frozen=True)
class World:
    """A published store, and what a cache looks like at four moments of its life."""

    store: LocalStore
    stages: tuple[Path, ...]
    digests: tuple[str, ...]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    store, digests = LocalStore(root / "store"), [HEX]
    for version in (1, 2):
        manifest, _ = publish(store, version=version, groups=2, shard_bytes=300, base_bytes=100, fresh=[0])
        digests += [manifest.base[0].digest[7:], manifest.groups[0].levels[1].digest[7:]]
    stages, device = [root / "empty"], Device(root / "cache", StoreSource(store), unsigned=True)
    stages[0].mkdir()
    steps: list[Callable[[], object]] = [
        lambda: device.pull("net", "1"),
        lambda: device.upgrade("net"),
        lambda: device.pull("net", "2"),
    ]
    for index, step in enumerate(steps):
        step()
        stages.append(root / f"stage{index}")
        shutil.copytree(root / "cache", stages[-1])
    return World(store, tuple(stages), tuple(dict.fromkeys(digests)))


@contextmanager
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("case")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


Seen = tuple[int, int, int, str | bytes]


def look(path: Path) -> Seen:
    """Return what stands at a path: its inode, type, time of change, and content or target."""
    seen = os.lstat(path)
    kind = stat.S_IFMT(seen.st_mode)
    if kind == stat.S_IFLNK:
        return seen.st_ino, kind, seen.st_mtime_ns, os.readlink(path)
    if kind == stat.S_IFREG:
        return seen.st_ino, kind, seen.st_mtime_ns, path.read_bytes()
    return seen.st_ino, kind, 0, ""


def tree(folder: Path) -> dict[str, Seen]:
    return {path.relative_to(folder).as_posix(): look(path) for path in folder.rglob("*")}


def plant(folder: Path, outside: Path, name: str, kind: str) -> bool:
    """Put something at a path where nothing is yet; tell whether that was possible."""
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            return False
        match kind:
            case "file":
                path.write_text(f"mine: {name}")
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case _:
                path.symlink_to(outside / kind.removeprefix("link to a ").replace(" ", "-"))
    except (FileExistsError, NotADirectoryError):  # something else planted stands in the way
        return False
    return True


def device_commands(folder: Path, store: LocalStore) -> list[Callable[[], object]]:
    device = Device(folder, StoreSource(store), unsigned=True, lock_timeout_s=1.0)
    return [
        lambda: device.verify("net"),
        lambda: device.verify("net", discard=True),
        lambda: device.pull("net", "2"),
        lambda: device.rollback("net"),
        lambda: device.upgrade("net"),
        lambda: device.pull("net", "1", level=1),
        lambda: device.status("net"),
        lambda: device.levels("net"),
        device.names,
        lambda: device.downgrade("net"),
        lambda: device.remove("other"),
        lambda: device.remove("net"),
    ]


def reading_commands(folder: Path) -> list[Callable[[], object]]:
    store = LocalStore(folder)
    registry = Registry(store)
    return [
        registry.models,
        lambda: [registry.tags(name) for name in registry.models()],
        lambda: registry.resolve("net"),
        lambda: fsck(store),
        lambda: gc(store),
    ]


def run(calls: list[Callable[[], object]]) -> int:
    """Run all; only errors of ours, in one line each. Return how many worked."""
    done, told = 0, list[str]()
    for call in calls:
        try:
            call()
        except StorageError as error:
            lines = str(error)
            assert "\n" not in lines, lines
        else:
            done += 1
    assert [message for message in told if "\n" in message] == []
    return done


def exact_names(digest: str) -> list[str]:
    """Return the names of a cache's files, of a digest and two models; blobs and staged bytes count eightfold."""
    names = [f"blobs/sha256/{digest[:2]}/{digest}", f"staging/{digest}.part"] * 8 + [f"staging/{digest}.etag", "lock"]
    for model in ("net", "other"):
        names += [f"models/{model}/state.json", f"models/{model}/state.json.new"]
        names += [f"models/{model}/manifests/{digest}.json", f"models/{model}/manifests/{digest}.json.new"]
        trust = f"trust/models/{model}"
        names += [f"{trust}/timestamp.json", f"{trust}/targets.json", f"{trust}/root_history/1.root.json"]
    return [*names, "trust/anchor.json"]


@st.composite
def paths(draw: st.DrawFn, digests: tuple[str, ...]) -> str:
    """Return a name of ours, or one that is a little off, or anything."""
    name = draw(st.sampled_from(exact_names(draw(st.sampled_from(digests)))))
    parts, word = name.split("/"), st.sampled_from(WORDS)
    at = draw(st.integers(0, len(parts) - 1))
    before, here, after = parts[:at], parts[at], parts[at + 1 :]
    anything = draw(st.lists(word, min_size=1, max_size=4))
    off = [
        anything,
        [f"{name}{draw(st.sampled_from(['.txt', '~', '.bak', '0', '.part', '.json', '.new']))}"],
        [name, draw(word)],
        parts[:-1] or anything,
        [*before, draw(word)],
        [*before, draw(word), here, *after],
        [*before, draw(word), *after],
        [*before, here.upper(), *after],
        [*before, *after] or anything,
    ]
    return "/".join(draw(st.sampled_from([parts, parts, *off])))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_nothing_of_others_is_touched(
    world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, len(world.stages)))
    wanted = data.draw(st.lists(st.tuples(paths(world.digests), KINDS), min_size=1, max_size=6))
    with scratch(tmp_path_factory) as case:
        folder, outside, is_store = case / "folder", case / "outside", stage == len(world.stages)
        shutil.copytree(world.store.root if is_store else world.stages[stage], folder, symlinks=True)
        (outside / "folder").mkdir(parents=True)
        (outside / "file").write_text("mine, elsewhere")
        for name in (f"{HEX}.part", f"{HEX}.json", HEX, "state.json", "timestamp.json"):
            (outside / "folder" / name).write_text("mine, elsewhere")
        planted = []
        for name, kind in wanted:
            marked = 0 < stage < len(world.stages)
            taken = OURS if kind == "file" else OUR_FOLDERS if kind == "folder" else None
            if name == CACHE_MARKER or (marked and taken is not None and taken.fullmatch(name)):
                continue  # taken for ours
            if plant(folder, outside, name, kind):
                planted.append(name)
        if is_store and data.draw(st.booleans()):
            (folder / CACHE_MARKER).touch()  # by a copy of a whole disk, say
        before = {name: look(folder / name) for name in planted} | tree(outside)
        whole = tree(folder)
        commands = device_commands(folder, world.store)
        if is_store:
            commands += reading_commands(folder)
        done = run(commands)
        where = "a store" if is_store else "a cache" if stage else "an empty folder"
        event(f"{where}: {'some' if done > 4 else 'no'} commands worked")
        after = {name: look(folder / name) for name in planted} | tree(outside)
        assert after == before
        if is_store:
            assert tree(folder) == whole


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_cache_is_whole_again_once_they_are_gone(
    world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """What stood in the way made commands fail, not the cache."""
    stage = data.draw(st.integers(1, len(world.stages) - 1))
    wanted = data.draw(st.lists(st.tuples(paths(world.digests), KINDS), min_size=1, max_size=4))
    with scratch(tmp_path_factory) as case:
        folder = case / "folder"
        shutil.copytree(world.stages[stage], folder)
        (case / "outside").mkdir()
        ours = set(tree(folder))
        for name, kind in wanted:
            if kind != "file":
                plant(folder, case / "outside", name, kind)
        planted = set(tree(folder)) - ours  # with the folders above them
        run(device_commands(folder, world.store)[:-1])
        for name in sorted(planted, reverse=True):
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        device = Device(folder, StoreSource(world.store), unsigned=True)
        if "net" in device.names():
            assert device.pull("net", "2", level=1).version == 2
            assert device.verify("net").whole
