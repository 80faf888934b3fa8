"""Whose files these are: a cache takes a folder that is empty or its own, and in it only names of its exact shape.

A cache is marked by the empty file ``storage.layout.CACHE_MARKER``. Caches of editions before the marker are recognised
by their shape: every name in them is one of ours, and a model's state is among them. What is not ours is never written,
moved or deleted, and no link is followed: one may lead anywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.device.errors import FULL, NotOurs
from storage.device.files import FILE_MODE, check_folder, is_file, read_file
from storage.document import parse_json
from storage.layout import BLOB_KEY, CACHE_MARKER, MODEL_NAME
from storage.manifest import MAX_MANIFEST_BYTES
from storage.stores.blob_store import is_key

Kind = Literal["lock", "marker", "blob", "staged", "state", "manifest", "trust"]

_HEX = "[0-9a-f]{64}"
_MODEL = f"models/{MODEL_NAME}"
_FILES: dict[Kind, re.Pattern[str]] = {
    "lock": re.compile("lock"),
    "marker": re.compile(re.escape(CACHE_MARKER)),
    "blob": re.compile(BLOB_KEY),
    "staged": re.compile(rf"staging/{_HEX}\.(?:part|etag)"),
    "state": re.compile(rf"{_MODEL}/state\.json(?:\.new)?"),
    "manifest": re.compile(rf"{_MODEL}/manifests/{_HEX}\.json(?:\.new)?"),
    "trust": re.compile(
        rf"trust/anchor\.(?:json|new|json\.new)|trust/{_MODEL}/(?:(?:timestamp|snapshot|targets|root)\.json"
        r"|root_history/[0-9]{1,9}\.root\.json|(?:root_history/)?tmp[a-z0-9_]{8})"
    ),
}
_FOLDERS = re.compile(
    rf"blobs|blobs/sha256|blobs/sha256/[0-9a-f]{{2}}|staging|models|{_MODEL}|{_MODEL}/manifests"
    rf"|trust|trust/models|trust/{_MODEL}|trust/{_MODEL}/root_history"
)
_FIXED_FOLDERS = ("blobs", "blobs/sha256", "staging", "models", "trust")
_VERSIONS = re.compile(r"[0-9]{8}\.json")
_ROOT_LINK = re.compile(r"root_history/[0-9]{1,9}\.root\.json")  # python-tuf's own
_OF_A_VOLUME = "lost+found"  # stands at the root of a file system of its own


@dataclass(frozen=True)
class Found:
    """Something in a cache's folder. ``name``: its path below the root. ``kind``: None where it is not ours."""

    name: str
    path: Path
    kind: Kind | None
    size_bytes: int

    @property
    def stem(self) -> str:
        """Return the file's name without its suffix: the hex digits, where it is named by a digest."""
        return self.path.name.split(".", 1)[0]


def walk(root: Path, below: str = "") -> Iterator[Found]:
    """Yield everything in a cache's folder, in order; folders that are not ours and links count as one thing each."""
    try:
        entries = sorted(os.scandir(root / below), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # gone since the folder was read
            continue
        if stat.S_ISDIR(status.st_mode) and _FOLDERS.fullmatch(name) and is_key(name):
            yield from walk(root, name)
        else:
            yield Found(name, Path(entry.path), _kind(name, status.st_mode, entry.path), status.st_size)


def claim(root: Path) -> None:
    """Mark an empty folder, or an old cache of ours, as a cache; for the holder of its lock. Raises as `check` does."""
    check(root)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    try:
        os.close(os.open(root / CACHE_MARKER, flags, FILE_MODE))
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in FULL:  # a full disk is freed first; the next one to hold the lock marks it
            raise


def check(root: Path) -> None:
    """Raise ``NotOurs`` where ``root`` is neither empty, nor a cache, nor absent; nothing is written."""
    if root.is_symlink() and not root.exists():
        raise NotOurs(f"{root}: a link to {os.readlink(root)!r}, which is not there; make that folder first")
    if not root.exists():
        return
    if not root.is_dir():
        raise NotOurs(f"{root}: a file; a cache is a folder: choose another one")
    if (published := _published(root)) is not None:
        raise NotOurs(f"{root}: a store is published here ({published}); choose another folder for the cache")
    for name in _FIXED_FOLDERS:
        check_folder(root, root / name)
    if not is_file(root / CACHE_MARKER) and (foreign := _foreign(root)) is not None:
        raise NotOurs(f"{root}: neither empty nor a cache (it holds {foreign!r}); choose an empty folder for the cache")


def _foreign(root: Path) -> str | None:
    """Return the first name that makes a folder without a marker somebody else's; None where it is empty or ours.

    Names of ours are not enough: a model's state must be one, or else each file must be what its name says by itself.
    Blobs cannot: those that no model asked for are a store's, for all we know.
    """
    unproven, models = None, 0
    for entry in walk(root):
        if entry.kind == "marker":  # somebody was faster
            return None
        if entry.kind is None and entry.name != _OF_A_VOLUME:
            return entry.name
        proven = entry.kind is None or _is_proven(entry)
        models += proven and entry.kind == "state"
        unproven = unproven or (None if proven else entry.name)
    return None if models else unproven


def _is_proven(entry: Found) -> bool:
    """Tell whether a file is what its name says: by its content, so that it cannot be anybody's."""
    if entry.kind not in ("state", "manifest", "trust") or entry.path.suffix != ".json":
        return entry.kind == "lock" and entry.size_bytes == 0
    if entry.path.is_symlink():  # python-tuf's, by its target
        return True
    raw = read_file(entry.path, max_bytes=MAX_MANIFEST_BYTES)
    try:
        if entry.kind == "manifest":
            return hashlib.sha256(raw).hexdigest() == entry.stem
        document = parse_json(raw)
        if entry.kind == "state":
            return bool(document["name"] == entry.path.parent.name and "current" in document)
        is_root = entry.stem == "anchor" or entry.path.parent.name == "root_history"
        return bool(document["signed"]["_type"] == ("root" if is_root else entry.stem))
    except (ValueError, TypeError, KeyError):
        return False


def _published(root: Path) -> str | None:
    """Return a published version or the root of trust of a store in this folder, if there is one."""
    for below in ("models", "trust"):
        if (root / below).is_symlink() or not (root / below).is_dir():
            continue
        for entry in os.scandir(root / below):
            if below == "trust" and entry.name.endswith(".root.json"):
                return f"trust/{entry.name}"
            versions = Path(entry.path) / "versions"
            if below == "models" and entry.is_dir(follow_symlinks=False) and versions.is_dir():
                for manifest in os.scandir(versions):
                    if _VERSIONS.fullmatch(manifest.name):
                        return f"models/{entry.name}/versions/{manifest.name}"
    return None


def is_ours(name: str) -> bool:
    """Tell whether a path below a cache's root is that of a file of ours, whatever stands there."""
    return _named(name) is not None


def _named(name: str) -> Kind | None:
    kind = next((kind for kind, pattern in _FILES.items() if pattern.fullmatch(name)), None)
    return kind if kind == "marker" or is_key(name) else None


def _kind(name: str, mode: int, path: str) -> Kind | None:
    kind = _named(name)
    if stat.S_ISLNK(mode) and kind == "trust" and name.endswith("/root.json"):
        return kind if _ROOT_LINK.fullmatch(os.readlink(path)) else None
    return kind if stat.S_ISREG(mode) else None
