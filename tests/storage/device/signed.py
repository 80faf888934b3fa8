"""A store whose versions are signed, and the keys behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from securesystemslib.signer import CryptoSigner

from storage.device import Device, Retry, StoreSource
from storage.signing.metadata import Signed, sign
from storage.stores.local import LocalStore


@dataclass
class Publisher:
    """A store with a root of trust, and the private keys behind it."""

    store: LocalStore
    root: CryptoSigner
    publisher: CryptoSigner
    online: CryptoSigner
    anchor: bytes

    def sign(self, name: str = "net", **options: object) -> Signed:
        return sign(self.store, name, [self.publisher, self.online], **options)  # type: ignore[arg-type]

    def device(self, folder: Path, anchor: bytes | None = None) -> Device:
        retry = Retry(attempts=2, base_s=0.001)
        return Device(folder, StoreSource(self.store), root_of_trust=anchor or self.anchor, retry=retry)
