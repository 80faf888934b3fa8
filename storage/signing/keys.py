"""Keys that sign: Ed25519, kept as PKCS#8 PEM files, encrypted where a passphrase is given."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from storage.errors import StorageError
from storage.wording import system_text


class SigningError(StorageError):
    """A key, a root or signed metadata cannot be made or used; the message says what to try."""


def generate_key(path: Path, *, passphrase: str | None = None) -> CryptoSigner:
    """Make a key: the private half in ``path`` (mode 0600), the public one in ``path`` + ``.pub``.

    An existing file is never overwritten.
    """
    private = Ed25519PrivateKey.generate()
    lock = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_new(path, pem, 0o600)
        public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        _write_new(path.with_name(f"{path.name}.pub"), public, 0o644)
    except FileExistsError as error:
        raise SigningError(f"{error.filename} exists; a key is never overwritten") from error
    except OSError as error:
        raise SigningError(f"{path}: {system_text(error)}") from error
    return CryptoSigner(private)


def load_key(place: str | Path, *, passphrase: str | None = None) -> CryptoSigner:
    """Return the signer of a PEM file, or of the environment variable NAME for ``env:NAME`` (a Ray job's secret)."""
    text = str(place)
    if text.startswith("env:"):
        pem = os.environ.get(text.removeprefix("env:"), "").encode()
        if not pem:
            raise SigningError(f"{text}: the variable is not set")
    else:
        try:
            pem = Path(place).read_bytes()
        except OSError as error:
            raise SigningError(f"key {text}: {system_text(error)}") from error
    try:
        private = load_pem_private_key(pem, passphrase.encode() if passphrase else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SigningError(f"key {text}: not a PEM private key, or a wrong or missing passphrase") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise SigningError(f"key {text}: {type(private).__name__}, expected Ed25519")
    return CryptoSigner(private)


def load_public_key(path: Path) -> Key:
    """Return the public key of a ``.pub`` file, to be named in a root."""
    try:
        public = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise SigningError(f"key {path}: {system_text(error)}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningError(f"key {path}: not a PEM public key") from error
    if not isinstance(public, Ed25519PublicKey):
        raise SigningError(f"key {path}: {type(public).__name__}, expected Ed25519")
    return SSlibKey.from_crypto(public)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
