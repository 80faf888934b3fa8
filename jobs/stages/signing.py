"""Where signing keys come from: files or the environment, unlocked by a passphrase that is never an argument."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

PASSPHRASE = "NESTQUANT_KEY_PASSPHRASE"


def load_keys(places: Sequence[str]) -> list[CryptoSigner]:
    """Return the signers of PEM files or ``env:NAME`` variables.

    Raises:
        storage.signing.keys.SigningError: there is none, or the passphrase does not fit.
    """
    from storage.signing.keys import load_key

    return [load_key(place, passphrase=os.environ.get(PASSPHRASE)) for place in places]
