from __future__ import annotations

from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from storage.signing.root import create_root
from storage.stores.local import LocalStore
from tests.storage.device.signed import Publisher


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    store = LocalStore(tmp_path / "store")
    root, targets, online = (CryptoSigner.generate_ed25519() for _ in range(3))
    anchor = create_root(store, [root], publishers=[targets.public_key], online=[online.public_key])
    return Publisher(store, root, targets, online, anchor)
