"""Text of strangers in our messages: no secret of an address is shown, no character steers a terminal, and none fills
it.
"""

from __future__ import annotations

import re
import traceback
import unicodedata
from pathlib import Path

_USERINFO = re.compile(r"(?<=://)[^/?#@\s'\"]*:?[^/?#@\s'\"]*@")
_SECRET_VALUE = re.compile(
    r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid|sig|token|access_?token|api_?key|"
    r"password|secret)=)[^&\s'\"<>)]*"
)

MOST_SEEN = 200
_MOST_LINE = 2000
# What a message quotes, lists, or says in one word: what was seen, not what we say of it.
_SEEN = re.compile(r"(?<![\w'])'[^'\n]*'(?!\w)|\"[^\"\n]*\"|\[[^\]\n]*\]|\S+")


def bounded(text: str) -> str:
    """Return a message with everything that it shows of somebody's input cut to 200 characters, head and tail kept.

    That is what stands in quotes or brackets, and any word; a line of more than 2,000 characters is cut as well.
    """
    if len(text) <= MOST_SEEN:
        return text
    lines = (_SEEN.sub(lambda match: _cut(match[0], MOST_SEEN), line) for line in text.split("\n"))
    return "\n".join(_cut(line, _MOST_LINE) for line in lines)


def _cut(text: str, most: int) -> str:
    head, tail = most * 3 // 4 - 5, most // 4
    return text if len(text) <= most else f"{text[:head]} ... {text[-tail:]}"


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


def in_one_line(text: str, *, most: int = 300) -> str:
    """Return text that fits into one line of a message: no control characters, no halves of characters, cut short."""
    clean = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return clean if len(clean) <= most else f"{clean[:most]}..."


def one_line(error: BaseException) -> str:
    """Return ``Kind: what it says`` in one line, for an error that somebody else's code raised.

    One that says nothing, as an assertion, is told by the line of code that raised it.
    """
    try:
        text = str(error).strip()
    except Exception:  # an error whose own text fails is still an error of its kind
        text = ""
    kind = type(error).__name__
    if text:
        return f"{kind}: {in_one_line(text.splitlines()[0])}"
    raised = traceback.extract_tb(error.__traceback__)[-1:]
    places = (f" at {in_one_line(at.line or '?')!r} ({Path(at.filename).name}:{at.lineno})" for at in raised)
    return kind + "".join(places)


def system_text(error: OSError) -> str:
    """Return what the operating system said, in one line."""
    return in_one_line(str(error.strerror or "")).strip() or one_line(error)


def size(count: int) -> str:
    """Return bytes for people: ``1.4 MB`` (decimal)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
