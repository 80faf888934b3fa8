"""What a manifest may say of how images become a network's inputs."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

MAX_PIXELS = 8192
MAX_CHANNELS = 1024


def check_preprocessing(record: dict[str, Any]) -> None:
    """Raise ``ValueError`` for what no network's preprocessing says: a size that would take gigabytes, a key unknown.

    ``size`` in pixels, one number or ``[height, width]``; ``resize`` likewise or None; ``mean`` and ``std`` by channel;
    ``interpolation`` by name.
    """
    keys = {"size", "resize", "mean", "std", "interpolation"}
    if unknown := sorted(set(record) - keys):
        raise ValueError(f"unknown key {str(unknown[0])[:40]!r}; known are {', '.join(sorted(keys))}")
    for key in ("size", "resize"):
        sides = record.get(key)
        listed = sides if isinstance(sides, list) else [sides]
        whole = all(type(side) is int and 1 <= side <= MAX_PIXELS for side in listed) and 1 <= len(listed) <= 2
        if not whole and not (key == "resize" and sides is None):
            raise ValueError(f"{key!r} is {str(sides)[:40]}; expected 1 to {MAX_PIXELS} pixels, or two such numbers")
    mean, std = record.get("mean", []), record.get("std", [])
    for key, values in (("mean", mean), ("std", std)):
        if not isinstance(values, list) or len(values) > MAX_CHANNELS or not all(map(_is_number, values)):
            raise ValueError(f"{key!r} is {str(values)[:40]}; expected at most {MAX_CHANNELS} numbers, one a channel")
    if len(mean) != len(std) or min(std, default=1) <= 0:
        raise ValueError("'mean' and 'std' must be as long as each other, and 'std' above 0")
    if record.get("interpolation", "bilinear") not in get_args(Interpolation):
        raise ValueError(
            f"'interpolation' is {str(record['interpolation'])[:40]!r}; expected {', '.join(get_args(Interpolation))}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value) and abs(value) <= 1e6
