"""Errors of asking: a spec that cannot be carried out.

One line each: what was seen, what was expected, what to try.
"""

from __future__ import annotations

from storage.wording import bounded


class JobError(Exception):
    """Root of everything that is wrong with what was asked."""

    def __str__(self) -> str:
        return bounded(super().__str__())


class SpecError(JobError):
    """The spec is not valid; the message names the key."""


class PlanError(JobError):
    """The spec is valid, but cannot be carried out on this model."""


class GateError(JobError):
    """The published version falls short of what the spec demands; it is stored, but not tagged."""


class ClusterError(JobError):
    """The Ray cluster cannot be reached, or lost the job's work."""
