"""Submit a job to a running cluster, and ask what became of it.

What the cluster knows dies with it; the record in the store is what counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.cluster.client import Cluster
from jobs.cluster.preflight import preflight
from jobs.cluster.record import TERMINAL, Attempt, End, JobRecord, Progress, Status
from jobs.cluster.request import request_digest
from jobs.errors import ClusterError, JobError
from jobs.spec.job import JobSpec
from jobs.stages.code import code_of
from storage.digest import digest_file, digest_hex, file_version
from storage.stores.blob_store import BlobStore, is_key
from storage.stores.local import LocalStore
from storage.stores.uri import open_store
from workers.inputs.files import local_path
from workers.scratch import scratch

PENDING_TIMEOUT_S = 600.0
_POLL_S = 1.0


@dataclass(frozen=True)
class JobState:
    """What is known of a job now."""

    status: Status
    attempt: Attempt | None
    progress: Progress | None
    end: End | None
    message: str | None = None


def submit(spec: JobSpec, address: str, *, check: bool = True) -> tuple[JobRecord, Attempt, bool]:
    """Submit a job, or find that it is running or done; return its record, its attempt, and whether that is new.

    With ``check``, the head and a worker are asked first whether they have what the job needs.

    Raises:
        ClusterError: the cluster is out of reach, refuses, or lacks something.
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
    if check:
        preflight(cluster, record, moved)
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
    record: JobRecord,
    cluster: Cluster | None = None,
    *,
    pending_timeout_s: float = PENDING_TIMEOUT_S,
    on_state: Callable[[JobState], None],
) -> JobState:
    """Wait for the end of a job.

    Ray leaves a driver that it cannot start in PENDING for ever: after ``pending_timeout_s`` it is stopped.

    Raises:
        ClusterError: it did not start in time.
    """
    begin = time.monotonic()
    while True:
        state = job_state(record, cluster)
        on_state(state)
        if state.status in TERMINAL:
            return state
        if state.status == "PENDING" and time.monotonic() - begin > pending_timeout_s:
            cancel(record, cluster)
            raise ClusterError(
                f"The job did not start within {pending_timeout_s:g} s and was stopped ({state.message or 'PENDING'}). "
                "Look at the head's load and its runtime environment, then 'nestquant jobs retry'."
            )
        time.sleep(_POLL_S)


def cancel(record: JobRecord, cluster: Cluster | None = None) -> JobState:
    """Stop a job; its finished units stay, and a retry goes on from there.

    Raises:
        ClusterError: nobody knows whether it runs: it was never submitted, or its cluster cannot be asked.
    """
    state = job_state(record, cluster)
    if state.attempt is None:
        raise ClusterError(f"{record.request} was never submitted: there is nothing to stop.")
    if state.status == "LOST":
        raise ClusterError(
            f"Nothing was stopped: {(state.message or 'the job is lost').rstrip('.')}. If that cluster is gone, so is "
            "the job's work; what it finished is kept, and 'nestquant jobs retry' goes on from there."
        )
    if state.status in TERMINAL:
        return state
    (cluster or Cluster(state.attempt.address)).stop(state.attempt)
    record.finish(state.attempt.number, End(status="STOPPED", error="cancelled", unix_s=int(time.time())))
    return job_state(record, cluster)


def portable(spec: JobSpec, store: BlobStore) -> JobSpec:
    """Return the spec with inputs where workers on other machines find them.

    Local files go into the store under ``inputs/``, named by their digest, part by part. A store that is itself a
    folder is taken to be one that all machines share, and so are the folders beside it: then paths become absolute, and
    that is all.
    """
    document: dict[str, Any] = spec.model_dump(mode="json")
    document["store"]["uri"] = store.uri
    for (section, key), uri in spec.inputs.items():
        document[section][key] = _reachable(uri, store, f"{section}.{key}")
    if spec.model.code is not None and not isinstance(store, LocalStore):
        with scratch("job") as folder:
            packed = folder / "code.zip"
            packed.write_bytes(code_of(spec.model.code, folder))
            document["model"]["code"] = _reachable(str(packed), store, "model.code")
    elif spec.model.code is not None:
        document["model"]["code"] = _reachable(spec.model.code, store, "model.code")
    return JobSpec.model_validate(document)


def _reachable(uri: str, store: BlobStore, key: str) -> str:
    if uri.startswith("s3://"):
        return uri
    path = local_path(uri).resolve()
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
