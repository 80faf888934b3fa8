"""Records in a job's ledger: created once by whoever is first, found by every later run."""

from __future__ import annotations

import contextlib
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from storage.errors import AlreadyExists, NotFound
from storage.manifest import canonical_json
from storage.registry import Registry
from workers.errors import WorkError

R = TypeVar("R")


def find_record(
    registry: Registry, key: str, kind: type[R] | TypeAdapter[R], *, then: str = "run the job again"
) -> R | None:
    """Return the record under ``key``, or None where no run has made it.

    Raises:
        WorkError: what stands there is no such record; ``then`` says what to do once it is deleted.
    """
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_json(registry.store.get(key))
    except NotFound:
        return None
    except ValidationError as error:
        raise WorkError(
            f"The job's record {key} is damaged ({error.error_count()} faults): delete it, and {then}."
        ) from error


def keep_record(registry: Registry, key: str, record: BaseModel) -> None:
    """Create a record; one that is there already, a second run by design wrote the same, and stands."""
    with contextlib.suppress(AlreadyExists):
        registry.store.put(key, canonical_json(record), mode="create")
