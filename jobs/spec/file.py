"""Reading a spec: YAML or JSON to a validated `jobs.spec.job`, or one line for each fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from jobs.errors import SpecError
from jobs.spec.document import parse_yaml, read_text, shortened, shown_value
from jobs.spec.job import JobSpec
from workers.errors import nearest

S = TypeVar("S", bound=BaseModel)

_MOST_FAULTS = 20
"""Lines about one document; a list of thousands of wrong items is one mistake."""


def load_spec(path: str | Path, *, changes: dict[str, Any] | None = None) -> JobSpec:
    """Read a spec from YAML or JSON; ``changes`` maps dotted keys (``store.uri``) to values that win over the file's.

    Raises:
        SpecError: one line for each fault, with the key, what was seen and what was expected.
    """
    return parse_spec(read_document(path, changes or {}), where=str(path))


def read_document(path: str | Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Read YAML or JSON keys, not validated yet; see ``load_spec``."""
    document = parse_yaml(read_text(path, "spec"), str(path))
    if not isinstance(document, dict):
        raise SpecError(f"{path} holds a {type(document).__name__}; expected keys such as 'name', 'model', 'store'.")
    return with_changes(document, changes)


def with_changes(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the document with dotted keys set."""
    result = dict(document)
    for dotted, value in changes.items():
        head, _, rest = dotted.partition(".")
        inner = result.get(head)
        if rest and head == "model" and isinstance(inner, str):  # the short form: the rest of the section follows
            inner = {"arch": inner}
        result[head] = with_changes(inner if isinstance(inner, dict) else {}, {rest: value}) if rest else value
    return result


def parse_spec(document: dict[str, Any], *, where: str) -> JobSpec:
    """Validate a document; see ``load_spec`` for the errors."""
    return parse_as(JobSpec, document, where=where)


def parse_as(kind: type[S], document: dict[str, Any], *, where: str) -> S:
    """Validate a document as one kind of spec; see ``load_spec`` for the errors."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        items = error.errors()
        # A faulty item of a list also makes the list too short for pydantic: that is not what is wrong.
        inner = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
        faults = [_fault(kind, dict(item)) for item in items if item["type"] != "too_short" or item["loc"] not in inner]
        more = [f"and {len(faults) - _MOST_FAULTS} faults more"] if len(faults) > _MOST_FAULTS else []
        raise SpecError("\n".join(f"{where}: {fault}" for fault in (*faults[:_MOST_FAULTS], *more))) from error


def _fault(root: type[BaseModel], item: dict[str, Any]) -> str:
    location = [str(step) for step in item["loc"]]
    key = ".".join(location) or "spec"
    if item["type"] == "extra_forbidden":
        keys = _known_keys(root, item["loc"][:-1])
        hint = f"{nearest(location[-1], keys)} Known here: {', '.join(sorted(keys))}."
        return f"unknown key {shortened(repr(key))}.{hint}"
    if item["type"] == "missing":
        return f"{key!r} is missing."
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = (
            "expected lower-case letters, digits, '.', '_' and '-', with a letter or digit at both ends, 128 at most"
        )
    if item["type"] == "too_short":
        message = "expected one or more"
    actual = "" if isinstance(item["input"], dict) else f" Seen: {shown_value(item['input'])}."
    return f"{shortened(repr(key))}: {shortened(message)}.{actual}"


def _known_keys(root: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """Walk down a place in the document; an index, or the key of a mapping, leads to what the items are."""
    section, in_mapping = root, False
    for step in path:
        if in_mapping or isinstance(step, int):
            in_mapping = False
            continue
        annotation = section.model_fields[step].annotation
        in_mapping = get_origin(annotation) is dict
        inner = [kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return set()
        section = inner[0]
    return set(section.model_fields)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the plain types inside an annotation such as ``dict[str, X]``, ``tuple[X, ...]`` or ``X | None``."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for kind in inner:
        yield from _kinds(kind)
