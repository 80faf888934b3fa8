"""The names of a version's classes, one blob: UTF-8 text, a name a line, class 0 first.

Publishers' own files of names are read by the same rules, and may have a byte order mark, carriage returns, and space
around a name.
"""

from __future__ import annotations

from collections.abc import Sequence

from storage.wording import printable

MAX_LABELS_BYTES = 16 << 20
MAX_LABEL_CHARACTERS = 256


def build_labels(labels: Sequence[str]) -> bytes:
    """Return the blob. Raises ``ValueError`` for what `parse_labels` would not give back."""
    raw = "".join(f"{label}\n" for label in labels).encode()
    if parse_labels(raw) != tuple(labels):
        raise ValueError("a name has space around it, or more than one line")
    return raw


def parse_labels(raw: bytes) -> tuple[str, ...]:
    """Return the names, by class. Raises ``ValueError`` that says which line is no name."""
    if len(raw) > MAX_LABELS_BYTES:
        raise ValueError(f"{len(raw)} bytes; expected {MAX_LABELS_BYTES} at most")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    labels = tuple(line.strip(" \t\r") for line in lines)
    for number, label in enumerate(labels, start=1):
        if not label:
            raise ValueError(f"line {number} is blank; expected one name a line, for every class")
        if len(label) > MAX_LABEL_CHARACTERS:
            raise ValueError(f"line {number} has {len(label)} characters; expected {MAX_LABEL_CHARACTERS} at most")
        if "\t" in label or printable(label) != label:
            raise ValueError(f"line {number} holds control characters: {printable(label)[:40]!r}")
    if not labels:
        raise ValueError("no line; expected one name a line")
    return labels
