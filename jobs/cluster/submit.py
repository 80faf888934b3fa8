"""Submit a job to a running cluster through Ray's Jobs API, and ask what became of it.

The code travels as ``py_modules`` (four small packages), weights and images as URIs, never as a working directory. What
the cluster knows dies with it; the record in the store is what counts.
"""

from __future__ import annotations

import importlib
import json
import logging
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.cluster.record import TERMINAL, Attempt, End, JobRecord, Progress, Status
from jobs.cluster.request import request_digest
from jobs.errors import ClusterError, JobError
from jobs.spec.job import JobSpec
from storage.digest import digest_file, digest_hex, file_version
from storage.stores.blob_store import BlobStore, is_key
from storage.stores.local import LocalStore
from storage.stores.uri import open_store

PACKAGES = ("jobs", "workers", "nestquant", "storage")
PENDING_TIMEOUT_S = 600.0
_POLL_S = 1.0
_AGENT_TIMEOUT_S = 120.0
_NO_AGENT = "No available agent"
_EXISTS = "already exists"
_EXAMPLE = "http://head:8265"


@dataclass(frozen=True)
class JobState:
    """What is known of a job now."""

    status: Status
    attempt: Attempt | None
    progress: Progress | None
    end: End | None
    message: str | None = None


class Cluster:
    """The Jobs API of one cluster."""

    def __init__(self, address: str) -> None:
        # Ray takes more than a dashboard's address, and waits most of a minute for what does not answer there.
        try:
            parts = urlsplit(address)
        except ValueError as error:
            raise ClusterError(f"{address!r} is no address ({error}); expected one such as {_EXAMPLE}.") from error
        if parts.username is not None or parts.password is not None:
            raise ClusterError(
                "No user or password in --address: RAY_JOB_HEADERS='{\"Authorization\": ...}' holds them."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterError(f"{address!r} is no address of a head's dashboard; expected one such as {_EXAMPLE}.")
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every package that it uploads
        self.address = address
        with self._asked("reached"):
            self.client = JobSubmissionClient(address)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Say in one line why the cluster could not be asked; the client raises whatever it meets."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"{self.address} wants a token, or another one: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's."
            ) from error
        except json.JSONDecodeError as error:
            raise ClusterError(
                f"What answers at {self.address} is not Ray; expected a head's dashboard, such as {_EXAMPLE}."
            ) from error
        except OSError as error:  # ConnectionError, and the HTTP client's own
            raise ClusterError(_unreachable(self.address, error)) from error
        except RuntimeError as error:
            raise ClusterError(f"{self.address} could not be {what}: {_first_line(error)}.") from error

    def start(self, record: JobRecord, attempt: Attempt) -> None:
        """Submit one attempt.

        A head that has just started answers before its job agent does, and its dashboard may hang up meanwhile: then
        the job is submitted again under the same name, and one that turns out to be there is the one meant.
        """
        words = ["python", "-m", "jobs.cluster.entry", record.store.uri, record.request, str(attempt.number)]
        modules = [str(Path(str(importlib.import_module(name).__file__)).parent) for name in PACKAGES]
        deadline, unanswered = time.monotonic() + _AGENT_TIMEOUT_S, False
        while True:
            try:
                self.client.submit_job(
                    entrypoint=shlex.join(words),
                    submission_id=attempt.submission_id,
                    runtime_env={"py_modules": modules},
                    metadata={"job": record.request},
                )
                return
            except Exception as error:  # the client raises RuntimeError, ConnectionError and requests' own
                if unanswered and _EXISTS in str(error):
                    return
                lost = isinstance(error, OSError)  # ConnectionError, and the HTTP client's own
                unanswered = unanswered or lost
                if not (lost or _NO_AGENT in str(error)) or time.monotonic() > deadline:
                    raise ClusterError(f"{self.address} refused the job: {_first_line(error)}.") from error
            time.sleep(_POLL_S)

    def status(self, attempt: Attempt) -> tuple[Status, str | None]:
        """Return what the cluster says of an attempt; LOST where it does not know it."""
        with self._asked("asked for the job"):
            try:
                info = self.client.get_job_info(attempt.submission_id)
            except RuntimeError as error:
                if "does not exist" in str(error) or "404" in str(error):
                    return "LOST", f"{self.address} does not know {attempt.submission_id}"
                raise
        status: Status = info.status.value
        return status, info.message

    def stop(self, attempt: Attempt) -> None:
        """Ask Ray to stop an attempt and wait until it has."""
        if self.status(attempt)[0] in TERMINAL:
            return
        with self._asked("asked to stop the job"):
            self.client.stop_job(attempt.submission_id)
        while self.status(attempt)[0] not in TERMINAL:
            time.sleep(_POLL_S)

    def logs(self, attempt: Attempt) -> str:
        """Return the driver's log so far."""
        with self._asked("asked for the log"):
            return str(self.client.get_job_logs(attempt.submission_id))

    def follow(self, attempt: Attempt) -> AsyncIterator[str]:
        """Yield the driver's log as it grows, until the job ends."""
        lines: AsyncIterator[str] = self.client.tail_job_logs(attempt.submission_id)
        return lines


def _unreachable(address: str, error: Exception) -> str:
    return (
        f"No Jobs API at {address}: {_first_line(error)}. Is the cluster up, and its dashboard forwarded "
        f"('ray dashboard')? Expected an address such as {_EXAMPLE}."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def submit(spec: JobSpec, address: str) -> tuple[JobRecord, Attempt, bool]:
    """Submit a job, or find that it is running or done; return its record, its attempt, and whether that is new.

    Raises:
        ClusterError: the cluster is out of reach, or refuses.
        WorkError, storage.StorageError: an input is missing, the store is out of reach.
    """
    cluster = Cluster(address)
    store = open_store(_absolute(spec.store.uri))
    request = request_digest(spec)
    record, moved = JobRecord(store, request), portable(spec, store)
    if request_digest(spec) != request:
        raise JobError(
            "A file of the spec was written to while it was submitted; wait for its writer and submit again."
        )
    record.ask(moved)
    state = job_state(record)
    if state.attempt is not None and (state.status not in TERMINAL or state.status == "SUCCEEDED"):
        return record, state.attempt, False
    return retry(record, cluster)


def retry(record: JobRecord, cluster: Cluster) -> tuple[JobRecord, Attempt, bool]:
    """Start the next attempt, unless somebody else does at this moment."""
    latest = record.latest()
    number = 1 if latest is None else latest.number + 1
    attempt = record.claim(number, cluster.address)
    if attempt is None:
        theirs = record.latest()
        assert theirs is not None
        return record, theirs, False
    cluster.start(record, attempt)
    return record, attempt, True


def job_state(record: JobRecord, cluster: Cluster | None = None) -> JobState:
    """Return how a job stands: by its own word in the store, else by the cluster's that it was submitted to."""
    attempt = record.latest()
    if attempt is None:
        return JobState("LOST", None, None, None, "never submitted")
    end = record.end(attempt.number)
    if end is not None:
        return JobState(end.status, attempt, None, end, end.error)
    progress = record.progress(attempt.number)
    try:
        status, message = (cluster or Cluster(attempt.address)).status(attempt)
    except ClusterError as error:
        return JobState("LOST", attempt, progress, None, str(error))
    # A driver keeps its end before it ends: read again, it may have done so between the two looks.
    if status in TERMINAL and (end := record.end(attempt.number)) is not None:
        return JobState(end.status, attempt, None, end, end.error)
    if status == "SUCCEEDED":
        status, message = "LOST", "the driver ended without leaving its result"
    return JobState(status, attempt, progress, None, message)


def wait(
    record: JobRecord, *, pending_timeout_s: float = PENDING_TIMEOUT_S, on_state: Callable[[JobState], None]
) -> JobState:
    """Wait for the end of a job.

    Ray leaves a driver that it cannot start in PENDING for ever: after ``pending_timeout_s`` it is stopped.

    Raises:
        ClusterError: it did not start in time.
    """
    begin = time.monotonic()
    while True:
        state = job_state(record)
        on_state(state)
        if state.status in TERMINAL:
            return state
        if state.status == "PENDING" and time.monotonic() - begin > pending_timeout_s:
            cancel(record)
            raise ClusterError(
                f"The job did not start within {pending_timeout_s:g} s and was stopped ({state.message or 'PENDING'}). "
                "Look at the head's load and its runtime environment, then 'nestquant jobs retry'."
            )
        time.sleep(_POLL_S)


def cancel(record: JobRecord) -> JobState:
    """Stop a job; its finished units stay, and a retry goes on from there.

    Raises:
        ClusterError: nobody knows whether it runs: it was never submitted, or its cluster cannot be asked.
    """
    state = job_state(record)
    if state.attempt is None:
        raise ClusterError(f"{record.request} was never submitted: there is nothing to stop.")
    if state.status == "LOST":
        raise ClusterError(
            f"Nothing was stopped: {(state.message or 'the job is lost').rstrip('.')}. If that cluster is gone, so is "
            "the job's work; what it finished is kept, and 'nestquant jobs retry' goes on from there."
        )
    if state.status in TERMINAL:
        return state
    Cluster(state.attempt.address).stop(state.attempt)
    record.finish(state.attempt.number, End(status="STOPPED", error="cancelled", unix_s=int(time.time())))
    return job_state(record)


def portable(spec: JobSpec, store: BlobStore) -> JobSpec:
    """Return the spec with inputs where workers on other machines find them.

    Local files go into the store under ``inputs/``, named by their digest, part by part. A store that is itself a
    folder is taken to be one that all machines share, and so are the folders beside it: then paths become absolute, and
    that is all.
    """
    document: dict[str, Any] = spec.model_dump(mode="json")
    document["store"]["uri"] = store.uri
    for section, key in (("model", "checkpoint"), ("calibration", "data"), ("evaluate", "data")):
        if document[section] is not None and document[section][key] is not None:
            document[section][key] = _reachable(document[section][key], store, f"{section}.{key}")
    return JobSpec.model_validate(document)


def _reachable(uri: str, store: BlobStore, key: str) -> str:
    if uri.startswith("s3://"):
        return uri
    path = Path(uri.removeprefix("file://")).expanduser().resolve()
    if isinstance(store, LocalStore):
        return str(path)
    if path.is_dir():
        raise JobError(f"{key}: {uri} is a folder on this machine; give a tar, an npz or an s3:// URI.")
    version, digest = file_version(path.stat()), digest_file(path)
    # Under its own name, for messages, where a store may hold it.
    plain = path.name.lower()
    name = f"inputs/{digest_hex(digest)}/{plain if is_key(plain) else f'file{path.suffix.lower()}'}"
    if not store.exists(name):
        store.put_file(name, path)
        if file_version(path.stat()) != version:
            store.delete(name)  # it may hold something else than its name says
            raise JobError(f"{key}: {uri} was written to while it was read; wait for its writer and submit again.")
    place, question, parameters = store.uri.partition("?")
    return f"{place.rstrip('/')}/{name}{question}{parameters}"


def _absolute(uri: str) -> str:
    """A driver on the cluster has another working folder."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())
