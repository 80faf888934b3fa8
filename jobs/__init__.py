"""What a person asks for: specs, plans, the driver, the command line.

``from jobs import JobSpec, run_job, load_spec, parse_spec, open_executor``: a job from Python. Names are looked up when
they are first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.driver import run_job
    from jobs.executors import open_executor
    from jobs.result import JobResult
    from jobs.spec.file import load_spec, parse_spec
    from jobs.spec.job import JobSpec

__all__ = ["JobResult", "JobSpec", "load_spec", "open_executor", "parse_spec", "run_job"]

_HOMES = {
    "JobResult": "jobs.result",
    "JobSpec": "jobs.spec.job",
    "load_spec": "jobs.spec.file",
    "open_executor": "jobs.executors",
    "parse_spec": "jobs.spec.file",
    "run_job": "jobs.driver",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jobs' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
