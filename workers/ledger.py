"""A job's ledger: what is done, created once by whoever is first, found by every later run.

    jobs/<hex>/units/<kind>-<index>.json          a stored shard group or base blob
    jobs/<hex>/sensitivity/<index>-<samples>-<widths>.json   a layer measured alone
    jobs/<hex>/mixed.json                         the bits that were chosen from those
    jobs/<hex>/synthetic/<name>                   images made without any, and the network fitted to them
    jobs/<hex>/solved/<index>.json                a layer solved with images
    jobs/<hex>/measured/<series>/<mode>-<start>-<stop>.json   right answers of one mode over a range of images

All keys are made here, all records are canonical JSON.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from storage.errors import AlreadyExists, NotFound
from storage.layout import job_prefix
from storage.manifest import canonical_json
from storage.registry import Registry
from workers.errors import WorkError

R = TypeVar("R")


@dataclass(frozen=True)
class Ledger:
    """The records of one job (its digest) in one store."""

    registry: Registry
    job: str

    def unit_key(self, kind: str, index: int) -> str:
        """Return where a finished unit's record stands."""
        return f"{job_prefix(self.job)}units/{kind}-{index:06d}.json"

    def sensitivity_key(self, index: int, samples: int, candidates: Sequence[tuple[int, ...]]) -> str:
        """Return where a measured layer's record stands; what else counts is in the job's digest."""
        widths = "_".join("-".join(map(str, bits)) for bits in candidates)
        return f"{job_prefix(self.job)}sensitivity/{index:06d}-{samples}-{widths}.json"

    @property
    def mixed_key(self) -> str:
        """Return where the bits that were chosen stand."""
        return f"{job_prefix(self.job)}mixed.json"

    def synthetic_key(self, name: str) -> str:
        """Return where something synthetic stands."""
        return f"{job_prefix(self.job)}synthetic/{name}"

    def equalized_key(self, name: str) -> str:
        """Return where the equalized network, or what is known of it, stands."""
        return f"{job_prefix(self.job)}equalized/{name}"

    def solved_key(self, index: int) -> str:
        """Return where a solved layer's record stands."""
        return f"{job_prefix(self.job)}solved/{index:06d}.json"

    def measured_key(self, series: str, mode: str, start: int, stop: int) -> str:
        """Return where the counts of one mode over images ``start:stop`` stand; ``series`` is what they rest on."""
        return f"{job_prefix(self.job)}measured/{series}/{mode}-{start:08d}-{stop:08d}.json"

    def find(self, key: str, kind: type[R] | TypeAdapter[R], *, then: str = "run the job again") -> R | None:
        """Return the record under ``key``, or None where no run has made it.

        Raises:
            WorkError: what stands there is no such record; ``then`` says what to do once it is deleted.
        """
        adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
        try:
            return adapter.validate_json(self.registry.store.get(key))
        except NotFound:
            return None
        except ValidationError as error:
            raise damaged(key, f"{error.error_count()} faults", then) from error

    def keep(self, key: str, record: BaseModel) -> None:
        """Create a record; one that is there already, a second run by design wrote the same, and stands."""
        with contextlib.suppress(AlreadyExists):
            self.registry.store.put(key, canonical_json(record), mode="create")

    def replace(self, key: str, record: BaseModel) -> None:
        """Write a record over what is there: what it named is gone."""
        self.registry.store.put(key, canonical_json(record), mode="overwrite")


def damaged(key: str, fault: str, then: str) -> WorkError:
    """Return what is raised for a record that cannot be relied upon."""
    return WorkError(f"The job's record {key} is damaged ({fault}): delete it, and {then}.")
