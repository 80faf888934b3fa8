"""What a device believes: signed metadata, verified by python-tuf before anything is cached under it.

    <cache>/trust/anchor.json                 the root that this cache was given; every other one must follow from it
    <cache>/trust/models/<name>/              what was last trusted for a model; nothing older is accepted after it

The chain is root -> timestamp -> snapshot -> targets -> manifest -> blobs (TUF specification 1.0, 5.2 to 5.7). Every
length is known, or bounded, before a byte is read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tuf.api import exceptions as tuf
from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from typing_extensions import override

from storage.device.errors import SourceDenied, SourceNotFound, Untrusted
from storage.device.files import disk_errors
from storage.device.resolve import Release, parse_release, parse_version, read_manifest
from storage.device.source import Documents
from storage.document import parse_json
from storage.layout import manifest_key
from storage.signing.metadata import (
    MAX_SNAPSHOT_BYTES,
    MAX_TARGETS_BYTES,
    MAX_TIMESTAMP_BYTES,
    MODEL_FIELD,
    SIGNED_AT_FIELD,
    tag_target,
    trust_key,
)
from storage.signing.root import MAX_ROOT_BYTES
from storage.stores.blob_store import check_key

_CLOCK_SLACK_S = 86_400.0
_CONFIG = UpdaterConfig(
    root_max_length=MAX_ROOT_BYTES,
    timestamp_max_length=MAX_TIMESTAMP_BYTES,
    snapshot_max_length=MAX_SNAPSHOT_BYTES,
    targets_max_length=MAX_TARGETS_BYTES,
    prefix_targets_with_hash=False,
)


@dataclass(frozen=True)
class Trust:
    """Resolves names by signed metadata alone. ``anchor``: a root of the store, needed the first time."""

    folder: Path
    anchor: bytes | None = None

    def resolve(self, documents: Documents, name: str, ref: str) -> Release:
        """Return the release that the publisher's signature names. Raises ``Untrusted``, ``InvalidManifest``."""
        version = parse_version(ref)
        target = tag_target(name, ref) if version is None else manifest_key(name, version)
        check_key(target)
        folder = self.folder / "models" / name
        with disk_errors(str(self.folder)):
            anchor = self._anchor()
            folder.mkdir(parents=True, exist_ok=True)
            try:
                updater = _updater(folder, anchor, self._roots(), _Fetcher(documents, name))
                updater.refresh()
                info = updater.get_targetinfo(target)
            except (tuf.RepositoryError, tuf.DownloadError) as error:
                _explain(error, name)
            finally:
                _flush(folder)
            _check_clock(folder, name)
        if info is None:
            raise Untrusted(f"{name}: nobody signed {'version' if version else 'tag'} {ref!r}")
        return _read_release(documents, name, info)

    def _anchor(self) -> bytes:
        pinned = self.folder / "anchor.json"
        if not pinned.exists():
            if self.anchor is None:
                raise Untrusted(f"{self.folder.parent} has no root of trust; give one (--trust root.json)")
            _check_anchor(self.anchor)
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = pinned.with_suffix(".new")
            temporary.write_bytes(self.anchor)
            temporary.replace(pinned)
            _flush(self.folder)
        known = pinned.read_bytes()
        if self.anchor not in {None, known, *self._roots()}:
            raise Untrusted(f"{self.folder.parent} trusts another root than the one given; use another cache for it")
        return known

    def _roots(self) -> list[bytes]:
        """Return the verified roots of all models' folders, newest first: a key revoked for one is so for all."""
        files = self.folder.glob("models/*/root_history/*.root.json")
        return [path.read_bytes() for path in sorted(files, key=_root_version, reverse=True)]


class _Fetcher(FetcherInterface):
    """Hands python-tuf the documents of one model, and refuses those of another before they are looked at."""

    def __init__(self, documents: Documents, name: str) -> None:
        self._documents, self._name = documents, name

    @override
    def _fetch(self, url: str) -> Iterator[bytes]:
        yield self.download_bytes(url, MAX_TARGETS_BYTES)

    @override
    def download_bytes(self, url: str, max_length: int) -> bytes:
        document = url.rpartition("/")[2].removesuffix(".json")
        is_root = document.endswith(".root")
        key = f"trust/{document}.json" if is_root else trust_key(self._name, document)
        try:
            data = self._documents.read(key, max_bytes=max_length)
        except (SourceNotFound, SourceDenied) as error:  # S3 answers 403 where a missing key may not be listed
            raise tuf.DownloadHTTPError(str(error), 404) from error
        if not is_root and (seen := _model_of(data)) != self._name:
            raise tuf.RepositoryError(f"{key} is signed for {seen!r}, not for {self._name!r}")
        return data


def _updater(folder: Path, anchor: bytes, roots: list[bytes], fetcher: _Fetcher) -> Updater:
    """Start from the newest root known; one that a power cut left damaged is passed over for the one before."""
    for root in [*roots, anchor]:
        try:
            return Updater(str(folder), "trust:/", fetcher=fetcher, config=_CONFIG, bootstrap=root)
        except tuf.RepositoryError:
            if root is anchor:
                raise
    raise AssertionError("unreachable: the anchor is the last one tried")


def _read_release(documents: Documents, name: str, info: TargetFile) -> Release:
    version = info.custom.get("version") if isinstance(info.custom, dict) else None
    if not isinstance(version, int) or "sha256" not in info.hashes:
        raise Untrusted(f"{name}: the signed target {info.path} names no version or no SHA-256")
    raw = read_manifest(documents, name, version, max_bytes=info.length)
    try:
        info.verify_length_and_hashes(raw)
    except tuf.LengthOrHashMismatchError as error:
        raise Untrusted(f"{name} version {version}: the manifest there is not the one that was signed") from error
    return parse_release(raw, name, version, signed=True)


def _explain(error: Exception, name: str) -> NoReturn:
    """Say in one line what the metadata lacked."""
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    match error:
        case tuf.ExpiredMetadataError():
            why = f"what is signed has expired ({error}); have it refreshed, or is the clock ({now} UTC) wrong?"
        case tuf.BadVersionNumberError():
            why = f"the source offers older metadata than was trusted before ({error})"
        case tuf.UnsignedMetadataError():
            why = f"not signed by the keys that the root names ({error})"
        case tuf.DownloadHTTPError():
            why = f"nothing signed for it here ({error}); take the store's word for it with --allow-unsigned"
        case _:
            why = str(error)
    raise Untrusted(f"{name}: {' '.join(why.split())}") from error


def _check_anchor(raw: bytes) -> None:
    from storage.signing.keys import SigningError
    from storage.signing.root import check_link

    try:
        check_link(raw, None)
    except SigningError as error:
        raise Untrusted(f"the root of trust given is none: {error}") from error


def _check_clock(folder: Path, name: str) -> None:
    """Refuse to judge expiry by a clock that is behind the last timestamp trusted.

    Those of older releases say when they were signed by their version alone, in milliseconds since 1970.
    """
    signed = json.loads((folder / "timestamp.json").read_bytes())["signed"]
    signed_s = signed.get(SIGNED_AT_FIELD, signed["version"] / 1000)
    if time.time() < signed_s - _CLOCK_SLACK_S:
        raise Untrusted(
            f"{name}: this machine's clock is {signed_s - time.time():.0f} s behind the publisher's; set it"
        )


def _model_of(data: bytes) -> object:
    try:
        return parse_json(data)["signed"].get(MODEL_FIELD)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _root_version(path: Path) -> int:
    number = path.name.split(".", 1)[0]
    return int(number) if number.isdigit() else 0


def _flush(folder: Path) -> None:
    """Flush what python-tuf wrote: a power cut must not forget what was trusted."""
    for path in [*folder.rglob("*.json"), folder]:
        if os.name == "posix" and path.exists():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
