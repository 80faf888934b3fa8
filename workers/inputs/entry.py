"""How an architecture of a team's own is named: ``package.module:function``. Specs are read with it: no torch here."""

from __future__ import annotations

import re

LIBRARY = "own"
_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_entry(text: str) -> bool:
    """Tell whether a text names a function: ``package.module:function``."""
    return _ENTRY.fullmatch(text) is not None
