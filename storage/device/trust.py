"""What a device believes: signed metadata, verified by python-tuf before anything is cached under it.

    <cache>/trust/anchor.json                 the root that this cache was given; every other one must follow from it
    <cache>/trust/models/<name>/              what was last trusted for a model; nothing older is accepted after it

The chain is root -> timestamp -> snapshot -> targets -> manifest -> blobs (TUF specification 1.0, 5.2 to 5.7). Every
length is known, or bounded, before a byte is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tuf.api import exceptions as tuf
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from typing_extensions import override

from storage.device.errors import SourceDenied, SourceNotFound, Untrusted
from storage.device.files import check_file, disk_errors, flush, is_file, make_folder, read_file, replace_file
from storage.device.ownership import is_ours, walk
from storage.device.resolve import Release, parse_release, read_manifest
from storage.device.source import Documents
from storage.digest import digest_hex
from storage.document import parse_json
from storage.layout import manifest_key, versions_prefix
from storage.references import parse_digest, parse_version
from storage.signing.metadata import (
    MAX_SNAPSHOT_BYTES,
    MAX_TARGETS_BYTES,
    MAX_TIMESTAMP_BYTES,
    MODEL_FIELD,
    SIGNED_AT_FIELD,
    tag_target,
    trust_key,
)
from storage.signing.rollouts import Member, chosen_target
from storage.signing.root import MAX_ROOT_BYTES
from storage.stores.blob_store import check_key

_CLOCK_SLACK_S = 86_400.0
_LATEST_S = 1e12  # beyond any calendar
_CONFIG = UpdaterConfig(
    root_max_length=MAX_ROOT_BYTES,
    timestamp_max_length=MAX_TIMESTAMP_BYTES,
    snapshot_max_length=MAX_SNAPSHOT_BYTES,
    targets_max_length=MAX_TARGETS_BYTES,
    prefix_targets_with_hash=False,
)


@dataclass(frozen=True)
class Trust:
    """Resolves names by signed metadata alone.

    ``root``: the cache, whose lock the caller holds. ``anchor``: a root of the store, needed the first time.
    """

    root: Path
    anchor: bytes | None = None

    @property
    def folder(self) -> Path:
        """Where what was last trusted is kept."""
        return self.root / "trust"

    def resolve(self, documents: Documents, name: str, ref: str, member: Member | None = None) -> Release:
        """Return the release that the publisher's signature names; for a tag, the one that a rollout gives ``member``.

        Raises ``Untrusted``, ``InvalidManifest``.
        """
        digest, version = parse_digest(ref), parse_version(ref)
        if digest is not None:
            what, info = f"a version with the digest {ref}", _by_digest(self._targets(documents, name), name, digest)
        else:
            path = check_key(tag_target(name, ref) if version is None else manifest_key(name, version))
            targets = self._targets(documents, name)
            what, info = f"{'tag' if version is None else 'version'} {ref!r}", targets.get(path)
            if version is None and info is not None and member is not None:
                info = _rolled_out(targets, name, ref, info, member)
        if info is None:
            raise Untrusted(f"{name}: nobody signed {what}")
        return _read_release(documents, name, info)

    def vouches(self, documents: Documents, name: str, digest: str) -> bool:
        """Tell whether the publisher still stands by a version. Raises ``Untrusted`` where nothing signed tells."""
        return _by_digest(self._targets(documents, name), name, digest) is not None

    def _targets(self, documents: Documents, name: str) -> dict[str, TargetFile]:
        """Return what the newest signed metadata of a model vouches for, by path."""
        folder = self.folder / "models" / name
        check_key(f"models/{name}")
        with disk_errors(str(self.folder)):
            anchor = self._anchor()
            make_folder(self.root, folder / "root_history")
            self._check_files()
            try:
                updater = _updater(folder, anchor, self._roots(), _Fetcher(documents, name))
                updater.refresh()
                targets: Metadata[Targets] = Metadata.from_bytes(
                    read_file(folder / "targets.json", max_bytes=MAX_TARGETS_BYTES)
                )
            except (tuf.RepositoryError, tuf.DownloadError) as error:
                _explain(error, name)
            finally:
                _flush(folder)
            _check_clock(folder, name)
        return targets.signed.targets

    def _anchor(self) -> bytes:
        pinned = self.folder / "anchor.json"
        if not is_file(pinned):
            if self.anchor is None:
                raise Untrusted(
                    f"{self.root} has no root of trust; give one (--trust root.json), "
                    "or take what nobody signed (--allow-unsigned)"
                )
            _check_anchor(self.anchor)
            make_folder(self.root, self.folder)
            replace_file(pinned, self.anchor)
        root = read_file(pinned, max_bytes=MAX_ROOT_BYTES)
        if self.anchor not in {None, root, *self._roots()}:
            raise Untrusted(f"{self.root} trusts another root than the one given; use another cache for it")
        return root

    def _roots(self) -> list[bytes]:
        """Return the verified roots of all models' folders, newest first: a key revoked for one is so for all."""
        files = [entry.path for entry in walk(self.root, "trust") if entry.kind == "trust"]
        roots = [path for path in files if path.parent.name == "root_history" and path.suffix == ".json"]
        return [read_file(path, max_bytes=MAX_ROOT_BYTES) for path in sorted(roots, key=_root_version, reverse=True)]

    def _check_files(self) -> None:
        """Raise ``NotOurs`` where a link or pipe stands under a name that python-tuf would read or write."""
        for entry in walk(self.root, "trust"):
            if entry.kind is None and is_ours(entry.name):
                check_file(entry.path)


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
        if not is_root and (model := _model_of(data)) != self._name:
            raise tuf.RepositoryError(f"{key} is signed for {model!r}, not for {self._name!r}")
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


def _by_digest(targets: dict[str, TargetFile], name: str, digest: str) -> TargetFile | None:
    """Return the version whose manifest has this digest, if it is vouched for; a tag alone does not count."""
    prefix = versions_prefix(name)
    matches = (file for path, file in targets.items() if path.startswith(prefix))
    return next((file for file in matches if file.hashes.get("sha256") == digest_hex(digest)), None)


def _rolled_out(targets: dict[str, TargetFile], name: str, tag: str, tagged: TargetFile, member: Member) -> TargetFile:
    """Return the target that a device runs of those that a tag and its rollouts name."""
    try:
        path = chosen_target(targets, name, tag, _version_of(tagged, name), member)
    except ValueError as error:
        raise Untrusted(f"{name}: {error}") from error
    if path is None:
        return tagged
    if path not in targets:
        raise Untrusted(f"{name}: a rollout of tag {tag!r} names a version that nobody signed")
    return targets[path]


def _version_of(info: TargetFile, name: str) -> int:
    version = info.custom.get("version") if isinstance(info.custom, dict) else None
    if not isinstance(version, int) or "sha256" not in info.hashes:
        raise Untrusted(f"{name}: the signed target {info.path} names no version or no SHA-256")
    return version


def _read_release(documents: Documents, name: str, info: TargetFile) -> Release:
    version = _version_of(info, name)
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
    signed = parse_json(read_file(folder / "timestamp.json", max_bytes=MAX_TIMESTAMP_BYTES))["signed"]
    signed_s = signed.get(SIGNED_AT_FIELD, signed["version"] / 1000)
    if isinstance(signed_s, bool) or not isinstance(signed_s, int | float) or not abs(signed_s) < _LATEST_S:
        raise Untrusted(f"{name}: the timestamp's {SIGNED_AT_FIELD} is no time since 1970 in seconds; sign it anew")
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
    for path in [*folder.glob("*.json"), *folder.glob("root_history/*.json"), folder / "root_history", folder]:
        if is_file(path) or path.is_dir():
            flush(path)
