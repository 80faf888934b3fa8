"""A submitted job's record in the object store, so that it outlives the cluster.

    jobs/<request>/spec.json                      what was asked, with inputs where workers can read them
    jobs/<request>/attempts/0001.json             who claimed the attempt: at most one submitter
    jobs/<request>/attempts/0001.progress.json    how far it is, rewritten every few seconds: also its heartbeat
    jobs/<request>/attempts/0001.log.jsonl        its events, when it ended
    jobs/<request>/attempts/0001.end.json         how it ended

All but progress and log are create-only. Attempts are found by number, never by LIST; the units that are done stand
in the job's own ledger (``workers.ledger``), which every attempt shares.
"""

from __future__ import annotations

import secrets
import time
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from jobs.errors import JobError, SpecError
from jobs.result import JobResult
from jobs.spec.job import JobSpec
from storage.digest import digest_hex
from storage.errors import AlreadyExists, NotFound
from storage.layout import job_prefix
from storage.manifest import Digest, Record, canonical_json
from storage.stores.blob_store import BlobStore
from workers.errors import shown

Status = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED", "LOST"]
TERMINAL: frozenset[Status] = frozenset({"SUCCEEDED", "FAILED", "STOPPED", "LOST"})

_MAX_BYTES = 64 << 20
_MIN_PREFIX = 6
R = TypeVar("R", bound=BaseModel)


class Attempt(Record):
    """One submission: to which cluster, under which id, and when (seconds since 1970)."""

    number: int
    submission_id: str
    address: str
    unix_s: int


class Progress(Record):
    """How far an attempt was at ``unix_s``."""

    stage: str
    done: int
    total: int
    unix_s: int


class End(Record):
    """How an attempt ended; ``error`` is one line, ``traceback`` the whole story."""

    status: Literal["SUCCEEDED", "FAILED", "STOPPED"]
    error: str | None = None
    traceback: str | None = None
    result: JobResult | None = None
    unix_s: int


class Asked(Record):
    """The job as submitted."""

    request: Digest
    spec: JobSpec


class JobRecord:
    """One job's record in one store."""

    def __init__(self, store: BlobStore, request: str) -> None:
        self.store, self.request = store, request
        self.prefix = job_prefix(request).rstrip("/")
        self.spec_key = f"{self.prefix}/spec.json"

    def ask(self, spec: JobSpec) -> JobSpec:
        """Keep the spec, or return the one that is kept already."""
        try:
            self.store.put(self.spec_key, canonical_json(Asked(request=self.request, spec=spec)), mode="create")
        except AlreadyExists:
            return self.spec()
        return spec

    def spec(self) -> JobSpec:
        """Return what was asked."""
        document = self._read(self.spec_key, Asked)
        if document is None:
            raise JobError(f"No job {self.request} in {self.store.uri}; 'nestquant jobs ls' shows what there is.")
        return document.spec

    def claim(self, number: int, address: str) -> Attempt | None:
        """Claim an attempt's number; None where somebody else did.

        Its id on the cluster is its own: the same job for another store, or for one that was emptied since, is another
        submission.
        """
        submission_id = f"{digest_hex(self.request)}-{number}-{secrets.token_hex(4)}"
        attempt = Attempt(number=number, submission_id=submission_id, address=address, unix_s=int(time.time()))
        try:
            self.store.put(self._key(number, "json"), canonical_json(attempt), mode="create")
        except AlreadyExists:
            return None
        return attempt

    def latest(self) -> Attempt | None:
        """Return the newest attempt."""
        number, newest = 1, None
        while (attempt := self._read(self._key(number, "json"), Attempt)) is not None:
            number, newest = number + 1, attempt
        return newest

    def beat(self, number: int, stage: str, count: int, total: int) -> None:
        """Say how far an attempt is, and that it lives."""
        progress = Progress(stage=stage, done=count, total=total, unix_s=int(time.time()))
        self.store.put(self._key(number, "progress.json"), canonical_json(progress), mode="overwrite")

    def progress(self, number: int) -> Progress | None:
        """Return what the attempt last said."""
        return self._read(self._key(number, "progress.json"), Progress)

    def finish(self, number: int, end: End) -> None:
        """Keep how an attempt ended; the first word stands."""
        try:
            self.store.put(self._key(number, "end.json"), canonical_json(end), mode="create")
        except AlreadyExists:
            return

    def end(self, number: int) -> End | None:
        """Return how an attempt ended, if it said so."""
        return self._read(self._key(number, "end.json"), End)

    def put_log(self, number: int, text: str) -> None:
        """Keep an attempt's events."""
        self.store.put(self._key(number, "log.jsonl"), text.encode(), mode="overwrite")

    def log(self, number: int) -> str | None:
        """Return an attempt's events, if it ended."""
        try:
            return self.store.get(self._key(number, "log.jsonl"), max_bytes=_MAX_BYTES).decode()
        except NotFound:
            return None

    def _key(self, number: int, what: str) -> str:
        return f"{self.prefix}/attempts/{number:04d}.{what}"

    def _read(self, key: str, kind: type[R]) -> R | None:
        try:
            data = self.store.get(key, max_bytes=_MAX_BYTES)
        except NotFound:
            return None
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise SpecError(
                f"The job's record {key} is damaged or from another release ({error.error_count()} faults)."
            ) from error


def requests(store: BlobStore) -> list[str]:
    """Return the digests of all submitted jobs, as LIST tells."""
    return [f"sha256:{name}" for name in store.folders("jobs/") if store.exists(f"jobs/{name}/spec.json")]


def find_job(store: BlobStore, text: str) -> JobRecord:
    """Return the record that a digest, with or without ``sha256:``, or its first six or more digits name.

    Raises:
        JobError: none or several do.
    """
    digits = text.lower().removeprefix("sha256:")
    if not _MIN_PREFIX <= len(digits) <= 64 or set(digits) - set("0123456789abcdef"):
        raise JobError(
            f"{text!r} names no job: give a job's digest, or {_MIN_PREFIX} or more of its digits (0-9, a-f); "
            "'nestquant jobs ls' lists them."
        )
    if len(digits) == 64:
        matches = [f"sha256:{digits}"] if store.exists(f"jobs/{digits}/spec.json") else []
    else:
        matches = [request for request in requests(store) if request.removeprefix("sha256:").startswith(digits)]
    if not matches:
        raise JobError(f"No job {text!r} in {store.uri}; 'nestquant jobs ls' lists those that were submitted there.")
    if len(matches) > 1:
        names = [request.removeprefix("sha256:")[: len(digits) + 6] for request in matches]
        raise JobError(f"{len(matches)} jobs begin with {text!r}: {shown(names)}; give more digits.")
    return JobRecord(store, matches[0])
