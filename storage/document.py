"""JSON that came from elsewhere: a store, a network, a disk. One parser, with one limit of depth, for all of it."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

MAX_DEPTH = 64  # ours nest 8 deep; beyond some hundreds, parsers and validators begin to differ in what they take
R = TypeVar("R", bound=BaseModel)


def parse_json(raw: bytes | str) -> Any:
    """Return the value that JSON text stands for.

    Raises ``ValueError`` with one line: not JSON, not UTF-8, NaN or infinity, a key twice, nested beyond ``MAX_DEPTH``.
    """
    try:
        value = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ValueError((str(error).splitlines() or ["not JSON"])[0][:200]) from error
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _containers(outer)]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def parse_record(raw: bytes, kind: type[R]) -> R:
    """Return the record that JSON text stands for. Raises ``ValueError`` with one line that names the field."""
    return as_record(parse_json(raw), kind)


def as_record(document: Any, kind: type[R]) -> R:
    """Return the record that a parsed document is. Raises ``ValueError`` with one line that names the field."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise ValueError(f"field {field}: {first['msg']} ({error.error_count()} errors in all)") from error


def _containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in inner if isinstance(one, dict | list)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands twice")
    return document


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
