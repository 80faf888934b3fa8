"""Which versions of which tools are at work."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution, and Python's."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
