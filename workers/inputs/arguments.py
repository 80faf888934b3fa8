"""Which arguments a spec or a manifest may hand to a library that builds a network.

A manifest is a stranger's word too: timm and pytorchcv take arguments that read local files, ask addresses or unpickle
checkpoints (``checkpoint_path``, ``root``, ``pretrained_cfg``, ``cache_dir``, ...). What describes a network's shape is
numbers, flags, short words and lists of them; nothing else passes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from workers.errors import ModelError

# Words about files, addresses or weights from elsewhere: anywhere in a name, or at its end (drop_path_rate is none).
_FORBIDDEN = frozenset({"url", "uri", "repo", "hub", "hf", "checkpoint", "ckpt", "pretrained", "cache", "download"})
_FORBIDDEN_LAST = frozenset({"path", "file", "dir", "folder", "root", "weights", "revision"})
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+. -]{0,63}|")
_MOST_NUMBER = 1e12
_MOST_VALUES = 1000
_MOST_DEPTH = 4


def check_arguments(arguments: Mapping[str, object]) -> None:
    """Raise ``ModelError`` for an argument that is more than a description of a network's shape.

    Allowed are None, flags, finite numbers, words of up to 64 letters, digits and ``_ + - .``, and lists and maps of
    them.
    """
    for name, value in arguments.items():
        words = re.split(r"[_\W]+", str(name).lower())
        if not _NAME.fullmatch(str(name)):
            raise ModelError(f"model.kwargs: {str(name)[:80]!r} is no argument's name.")
        if not _FORBIDDEN.isdisjoint(words) or words[-1] in _FORBIDDEN_LAST:
            raise ModelError(
                f"model.kwargs.{name}: an argument about files, addresses or pretrained weights is not taken; "
                "say model.checkpoint or model.pretrained instead."
            )
        if (fault := _fault(value, _MOST_DEPTH, [_MOST_VALUES])) is not None:
            expected = "numbers, true or false, short words, or lists of them"
            raise ModelError(f"model.kwargs.{name}: {fault}; expected {expected}.")


def _fault(value: object, depth: int, budget: list[int]) -> str | None:
    """Say what is wrong with a value, or None; ``left`` counts down the values that may still come."""
    budget[0] -= 1
    if budget[0] < 0:
        return f"more than {_MOST_VALUES} values"
    if not isinstance(value, list | tuple | dict):
        return _scalar_fault(value)
    if not depth:
        return f"nested more than {_MOST_DEPTH} levels deep"
    if isinstance(value, dict):
        try:
            check_arguments(value)
        except ModelError as error:
            return str(error).rstrip(".")
    inner = value.values() if isinstance(value, dict) else value
    return next((fault for one in inner if (fault := _fault(one, depth - 1, budget)) is not None), None)


def _scalar_fault(value: object) -> str | None:
    match value:
        case None | bool():
            return None
        case int() | float():
            return None if math.isfinite(value) and abs(value) <= _MOST_NUMBER else "a number beyond 1e12"
        case str():
            return None if _WORD.fullmatch(value) and ".." not in value else f"the text {value[:40]!r}"
        case _:
            return f"a {type(value).__name__}"
