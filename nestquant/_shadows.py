"""Our four packages lie at the top of site-packages: a file of the same name nearer to a script hides one from us."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("jobs", "workers", "storage", "nestquant")
_ROOT = Path(__file__).resolve().parent.parent


def check_packages() -> None:
    """Raise where Python would import somebody else's module in the place of one of our packages.

    Raises:
        ImportError: one line with the file that hides the package, and what to do.
    """
    for name in PACKAGES:
        loaded = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
        origin = getattr(loaded, "__file__", None) if spec is None else spec.origin
        place = origin or next(iter(getattr(spec, "submodule_search_locations", None) or ()), None)
        if place is not None and Path(place).resolve() != _ROOT / name / "__init__.py":
            raise ImportError(
                f"nestquant needs its own package {name!r} ({_ROOT / name}), and {place} hides it: rename that file, "
                "or run the script from another folder."
            )
