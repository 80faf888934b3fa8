"""Text of strangers in our messages: no secret of an address is shown, and no character steers a terminal."""

from __future__ import annotations

import re
import unicodedata

_USERINFO = re.compile(r"(?<=://)[^/?#@\s'\"]*:?[^/?#@\s'\"]*@")
_SECRET_VALUE = re.compile(
    r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid|sig|token|access_?token|api_?key|"
    r"password|secret)=)[^&\s'\"<>)]*"
)


def without_secrets(text: str) -> str:
    """Return the text with user, password and signatures of addresses in it replaced by ``...``."""
    return _SECRET_VALUE.sub(r"\1...", _USERINFO.sub("...@", text))


def printable(text: str) -> str:
    """Return the text with every character that a terminal obeys instead of showing replaced by U+FFFD.

    Those are control characters but line feed and tab (C0, C1, DEL), and the marks that turn text around or hide it
    (Unicode's general categories Cc and Cf; zero-width joiners, which some scripts need, stay).
    """
    return "".join(_shown(character) for character in text) if not text.isascii() or not text.isprintable() else text


def _shown(character: str) -> str:
    if character in "\n\t\u200c\u200d":
        return character
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cf", "Cs") else character
