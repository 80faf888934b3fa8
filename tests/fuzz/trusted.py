"""What a device reads besides artifacts: its own state, and signed metadata, from the source and from its own disk.

Metadata that nobody signed is refused by its signature; so that what comes after is reached, a document may be signed
here with the right keys, and those above it made to fit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

from storage.device import Device, Retry, StoreSource
from storage.errors import StorageError
from storage.layout import CACHE_MARKER, manifest_key
from storage.signing.metadata import MODEL_FIELD, sign, trust_key
from storage.signing.root import create_root, root_key
from storage.stores.memory import MemoryStore
from tests.storage.device.artifacts import digest_of, publish

ROLES = ("timestamp", "1.snapshot", "1.targets", "2.root")
KEPT = ("anchor.json", "{m}/timestamp.json", "{m}/snapshot.json", "{m}/targets.json", "{m}/root_history/1.root.json")


@dataclass
class Bench:
    """A signed version 1 of ``net``, what a cache keeps of it, and the keys."""

    store: MemoryStore = field(default_factory=lambda: MemoryStore("fuzz"))
    root: CryptoSigner = field(default_factory=CryptoSigner.generate_ed25519)
    online: CryptoSigner = field(default_factory=CryptoSigner.generate_ed25519)

    def __post_init__(self) -> None:
        keys = {"publishers": [self.online.public_key], "online": [self.online.public_key]}
        self.anchor = create_root(self.store, [self.root], **keys)
        self.manifest, _ = publish(self.store, groups=1, shard_bytes=40, base_bytes=20)
        sign(self.store, "net", [self.online], tags={"latest": 1})
        self.raw = self.store.get(manifest_key("net", 1))
        self.documents = {role: self.store.get(self.key(role)) for role in ROLES[:3]} | {"2.root": self.anchor}
        with scratch() as folder:
            self.device(folder).resolve("net")
            trust = folder / "trust"
            names = [name.format(m="models/net") for name in KEPT]
            self.kept = {name: (trust / name).read_bytes() for name in names}

    def key(self, role: str) -> str:
        return root_key(2) if role == "2.root" else trust_key("net", role)

    def device(self, folder: Path, store: MemoryStore | None = None) -> Device:
        retry = Retry(attempts=1, base_s=0.0)
        return Device(folder, StoreSource(store or self.store), root_of_trust=self.anchor, retry=retry)

    def signed(self, role: str, document: dict[str, Any]) -> dict[str, bytes]:
        """Return a document with a signature that holds, and those above it so that they name it."""
        signer = self.root if role == "2.root" else self.online
        found = {role: _sign(document, signer)}
        version = document.get("version")
        version = version if isinstance(version, int) and 0 < version < 1 << 53 else 1
        if role == "1.targets":
            meta = {"targets.json": MetaFile.from_data(version, found[role], ["sha256"])}
            snapshot = Snapshot(1, expires=_signed(self.documents["1.snapshot"]).expires, meta=meta)
            snapshot.unrecognized_fields[MODEL_FIELD] = "net"
            found["1.snapshot"], version = _sign(snapshot.to_dict(), self.online), 1
        if role in ("1.targets", "1.snapshot"):
            above = MetaFile.from_data(version, found["1.snapshot"], ["sha256"])
            before = _signed(self.documents["timestamp"])
            timestamp = Timestamp(before.version, expires=before.expires, snapshot_meta=above)
            timestamp.unrecognized_fields |= before.unrecognized_fields
            found["timestamp"] = _sign(timestamp.to_dict(), self.online)
        return found


@cache
def bench() -> Bench:
    """Return the one bench of this process."""
    return Bench()


def one_line(error: object) -> None:
    """What a user is shown fits one line."""
    assert "\n" not in str(error), error


def read_metadata(role: str, data: bytes, *, sign_it: bool = False) -> str:
    """Serve ``data`` as a signed document; with ``sign_it`` as the part of one that is signed. Return what was said."""
    served = MemoryStore("served")
    for info in bench().store.list():
        served.put(info.key, bench().store.get(info.key), mode="create")
    documents = {role: data}
    if sign_it:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        if isinstance(document, dict):
            documents = bench().signed(role, document)
    for name, raw in documents.items():
        served.put(bench().key(name), raw, mode="overwrite")
    with scratch() as folder:
        return _told(lambda: bench().device(folder, served).resolve("net"))


def read_trusted(name: str, data: bytes) -> str:
    """Put ``data`` in the place of something that was trusted, and ask again. Return what was said."""
    with scratch() as folder:
        for kept, raw in (bench().kept | {name: data}).items():
            path = folder / "trust" / kept
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        return _told(lambda: bench().device(folder).resolve("net"))


def read_state(data: bytes) -> list[str]:
    """Let a cache hold ``data`` as a model's state, beside a whole model; return what each command said."""
    with scratch() as folder:
        (folder / "models/net/manifests").mkdir(parents=True)
        (folder / f"models/net/manifests/{digest_of(bench().raw)[7:]}.json").write_bytes(bench().raw)
        (folder / "models/net/state.json").write_bytes(data)
        device = Device(folder, StoreSource(bench().store), unsigned=True)
        calls: list[Callable[[], object]] = [
            lambda: device.status("net"),
            lambda: device.levels("net"),
            lambda: device.verify("net"),
            lambda: device.rollback("net"),
            lambda: device.downgrade("net"),
            lambda: device.upgrade("net"),
        ]
        said = [_told(call) for call in calls]
        device.remove("net")  # whatever it is
        assert device.names() == []
        return said


def _told(call: Callable[[], object]) -> str:
    """Return the error's line; anything but a ``StorageError`` is a crash."""
    try:
        call()
    except StorageError as error:
        one_line(error)
        return str(error)
    return ""


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder that is a cache, in memory where there is such a place."""
    shared = "/dev/shm"
    folder = Path(tempfile.mkdtemp(prefix="nestquant-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))
    (folder / CACHE_MARKER).touch()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _signed(raw: bytes) -> Any:
    return Metadata.from_bytes(raw).signed


def _sign(document: dict[str, Any], signer: CryptoSigner) -> bytes:
    """Return metadata with a signature over what a reader makes of the document; over the document where it is none."""
    bare = json.dumps({"signatures": [], "signed": document}).encode()
    try:
        payload = Metadata.from_bytes(bare).signed_bytes
    except RepositoryError:
        try:
            payload = encode_canonical(document).encode()
        except Exception:
            payload = b""
    signature = signer.sign(payload).to_dict()
    return json.dumps({"signatures": [signature], "signed": document}).encode()
