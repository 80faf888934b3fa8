"""Reading YAML or JSON that somebody wrote: bounded, each key once, and what was seen told in a few words.

PyYAML lets a key stand twice (the last one wins, YAML 1.2.2, 3.2.1.1 forbids it), and lets a few aliases stand for
millions of values; both are refused here.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from jobs.errors import SpecError

MAX_BYTES = 4 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 64
_SHOWN = 200


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a small file that a person wrote.

    Raises:
        SpecError: there is none, it cannot be read, is larger than ``MAX_BYTES``, or is not UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise SpecError(f"{path} holds more than {MAX_BYTES >> 20} MiB; expected {what}.")
        return raw.decode()
    except FileNotFoundError as error:
        raise SpecError(f"No {what} at {path}: there is no such file.") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not UTF-8 (byte {error.start}); expected {what}: save it as UTF-8.") from error
    except (OSError, ValueError) as error:  # a ValueError for a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"Cannot read {path}: {reason}; expected {what}.") from error


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        SpecError: it is not valid, a key stands twice, or it holds more or deeper values than a spec has.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, where)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" in line {place.line + 1}" if place is not None else ""
        reason = shortened(getattr(error, "problem", None) or error)
        raise SpecError(f"{where} is not valid YAML{line}: {reason}.") from error
    except RecursionError as error:
        raise SpecError(f"{where} is nested more than {MAX_DEPTH} levels deep.") from error
    except (ValueError, OverflowError, TypeError) as error:  # an integer of 5,000 digits, a date of the month 13
        raise SpecError(f"{where} holds a value that cannot be read: {shortened(error)}.") from error


def shortened(text: object) -> str:
    """Return a message's text as one line of at most 200 characters."""
    line = " ".join(str(text)[: 100 * _SHOWN].split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 4]} ..."


def shown_value(value: object) -> str:
    """Return a value as Python writes it, in at most 200 characters; a longer text is never built."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 120
    brief.maxlevel = 3
    try:
        return shortened(brief.repr(value))
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__}"


def _check(root: Node, where: str) -> None:
    """Refuse keys that stand twice, and more or deeper values than a spec has (aliases written out)."""
    sizes: dict[int, int] = {}
    under_way: set[int] = set()

    def count(node: Node, depth: int) -> int:
        key = id(node)
        if key in under_way or depth > MAX_DEPTH:
            raise SpecError(f"{where}, line {node.start_mark.line + 1}: nested more than {MAX_DEPTH} levels deep.")
        if key not in sizes:
            under_way.add(key)
            sizes[key] = 1 + sum(count(child, depth + 1) for child in _children(node, where))
            under_way.discard(key)
            if sizes[key] > MAX_VALUES:
                raise SpecError(
                    f"{where}, line {node.start_mark.line + 1}: more than {MAX_VALUES:,} values, aliases written out; "
                    "a spec has some dozens."
                )
        return sizes[key]

    count(root, 0)


def _children(node: Node, where: str) -> list[Node]:
    if isinstance(node, SequenceNode):
        return list(node.value)
    if not isinstance(node, MappingNode):
        return []
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            name = (key.tag, str(key.value))
            if name in lines:
                text = shortened(repr(key.value))
                raise SpecError(f"{where}: key {text} stands twice, in lines {lines[name]} and {line}; keep one.")
            lines[name] = line
    return [child for pair in node.value for child in pair]
