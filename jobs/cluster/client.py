"""One cluster through Ray's Jobs API: what is asked of it, and what it answers in one line where it fails.

The code travels as ``py_modules`` (four small packages), weights and images as URIs, never as a working directory.
"""

from __future__ import annotations

import importlib
import json
import logging
import shlex
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from jobs.cluster.record import TERMINAL, Attempt, JobRecord, Status
from jobs.errors import ClusterError

PACKAGES = ("jobs", "workers", "nestquant", "storage")
_POLL_S = 1.0
_AGENT_TIMEOUT_S = 120.0
_NO_AGENT = "No available agent"
_EXISTS = "already exists"
_TALKERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Ray's loggers that tell of every package that is uploaded, or is not; each has a level of its own."""

_EXAMPLE = "http://head:8265"


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

        for name in _TALKERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        with self._answering("reached"):
            self.client = JobSubmissionClient(address)

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
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
        """Submit one attempt of a job."""
        words = ["python", "-m", "jobs.cluster.entry", record.store.uri, record.request, str(attempt.number)]
        self._submit(shlex.join(words), attempt.submission_id, job=record.request)

    def run_to_end(self, entrypoint: str, submission_id: str, *, timeout_s: float) -> tuple[Status, str | None, str]:
        """Run a command on the head with our code, and return its status, Ray's message and what it printed.

        It is stopped after ``timeout_s``, and then its status is what it was.
        """
        self._submit(entrypoint, submission_id)
        deadline = time.monotonic() + timeout_s
        status, message = self._state(submission_id)
        while status not in TERMINAL and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            status, message = self._state(submission_id)
        with self._answering("asked for the log"):
            log = str(self.client.get_job_logs(submission_id))
            if status not in TERMINAL:
                self.client.stop_job(submission_id)
        return status, message, log

    def _submit(self, entrypoint: str, submission_id: str, **metadata: str) -> None:
        """Submit under a name.

        A head that has just started answers before its job agent does, and its dashboard may hang up meanwhile: then
        the job is submitted again under the same name, and one that turns out to be there is the one meant.
        """
        modules = [str(Path(str(importlib.import_module(name).__file__)).parent) for name in PACKAGES]
        deadline, unanswered = time.monotonic() + _AGENT_TIMEOUT_S, False
        while True:
            try:
                self.client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env={"py_modules": modules},
                    metadata=metadata,
                )
                return
            except Exception as error:  # the client raises RuntimeError, ConnectionError and requests' own
                if unanswered and _EXISTS in str(error):
                    return
                lost = isinstance(error, OSError)  # ConnectionError, and the HTTP client's own
                unanswered = unanswered or lost
                absent = _NO_AGENT in str(error)
                if not (lost or absent) or time.monotonic() > deadline:
                    reason = _first_line(error)
                    if absent:
                        reason = (
                            f"no agent that starts jobs came up within {_AGENT_TIMEOUT_S:g} s; the head's "
                            "dashboard_agent.log says why (ray[default] not installed there, or a port taken)"
                        )
                    raise ClusterError(f"{self.address} refused the job: {reason}.") from error
            time.sleep(_POLL_S)

    def status(self, attempt: Attempt) -> tuple[Status, str | None]:
        """Return what the cluster says of an attempt; LOST where it does not know it."""
        return self._state(attempt.submission_id)

    def _state(self, submission_id: str) -> tuple[Status, str | None]:
        with self._answering("asked for the job"):
            try:
                info = self.client.get_job_info(submission_id)
            except RuntimeError as error:
                if "does not exist" in str(error) or "404" in str(error):
                    return "LOST", f"{self.address} does not know {submission_id}"
                raise
        status: Status = info.status.value
        return status, info.message

    def stop(self, attempt: Attempt) -> None:
        """Ask Ray to stop an attempt and wait until it has."""
        if self.status(attempt)[0] in TERMINAL:
            return
        with self._answering("asked to stop the job"):
            self.client.stop_job(attempt.submission_id)
        while self.status(attempt)[0] not in TERMINAL:
            time.sleep(_POLL_S)

    def logs(self, attempt: Attempt) -> str:
        """Return the driver's log so far."""
        with self._answering("asked for the log"):
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
