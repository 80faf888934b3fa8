"""Why a worker cannot import our packages: they are not installed there, or a file of the user's hides one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import ray

from workers.errors import WorkError, printable

_MISSING = re.compile(r"No module named '((?:jobs|workers|storage|nestquant)(?:\.[\w.]+)?)'")
_ASK_S = 60.0


def import_fault(error: BaseException) -> WorkError | None:
    """Return one line on an import of our packages that failed in a worker; None where ``error`` is none.

    Ray reports it as a system error when it reads the task, so that it looks like a lost worker. A worker is asked
    which file stands for the package there: a runtime environment's working directory comes before what is installed.
    """
    missing = _MISSING.search(str(error))
    if missing is None:
        return None
    package = missing[1].partition(".")[0]
    place = _ask(package)
    if place is None:
        return WorkError(
            f"Workers have no package {package!r} ({missing[0]}): install nestquant-service on every machine of the "
            "cluster, in the version that is here, or use 'nestquant submit', which sends the packages along."
        )
    if Path(place).name == "__init__.py":
        return WorkError(
            f"Workers import {printable(place)}, which is another version of our package {package!r} ({missing[0]}): "
            "install the version that is here on every machine, or use 'nestquant submit', which sends it along."
        )
    return WorkError(
        f"Workers import {printable(place)} in the place of our package {package!r}, and cannot go on ({missing[0]}): "
        "rename that file, or leave it out of the working_dir of Ray's runtime environment."
    )


def _ask(package: str) -> str | None:
    """Return the file that a worker imports as a package, or its folder; None where there is none or none answers."""

    # Defined here, so that Ray sends the code itself and the worker imports none of our packages for it.
    def origin(name: str) -> str | None:
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is None:
            return None
        return spec.origin or next(iter(spec.submodule_search_locations or ()), None)

    ask: Callable[..., str | None] = ray.remote(num_cpus=0, max_retries=0)(origin).remote
    with contextlib.suppress(ray.exceptions.RayError):
        place: str | None = ray.get(ask(package), timeout=_ASK_S)
        return place
    return None
