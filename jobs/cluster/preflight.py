"""Before a job is submitted: ask the head and a worker for what would end it there, and say it here, a line a fault."""

from __future__ import annotations

import json
import shlex
import uuid
from dataclasses import asdict

from jobs.cluster.client import Cluster
from jobs.cluster.probe import MARK, Answer, Question
from jobs.cluster.record import JobRecord
from jobs.errors import ClusterError
from jobs.spec.job import JobSpec
from storage.digest import digest_hex
from workers.errors import printable

TIMEOUT_S = 300.0
"""A head that has just started takes most of a minute to make the environment of a first job."""


def preflight(cluster: Cluster, record: JobRecord, spec: JobSpec) -> tuple[Answer, ...]:
    """Return what the head and a worker answered; ``spec`` is the one that the job's record holds.

    Raises:
        ClusterError: one of them lacks something; a line for each fault, with the machine that it is on.
    """
    question = Question(
        store=record.store.uri,
        request=record.request,
        inputs=tuple((".".join(place), uri) for place, uri in spec.inputs.items()),
        cpus_per_task=spec.cluster.cpus_per_task,
        node_timeout_s=spec.cluster.node_timeout_s,
    )
    words = ["python", "-m", "jobs.cluster.probe", json.dumps(asdict(question))]
    name = f"check-{digest_hex(record.request)[:12]}-{uuid.uuid4().hex[:8]}"
    status, message, log = cluster.run_to_end(
        shlex.join(words), name, timeout_s=TIMEOUT_S + spec.cluster.node_timeout_s
    )
    answers = read_answers(log)
    roles = {answer.role for answer in answers}
    if roles != {"head", "worker"}:
        lines = [line for line in log.splitlines() if line.strip() and not line.startswith(MARK)]
        reason = lines[-1].strip() if lines else message or "it says nothing"
        raise ClusterError(
            f"{cluster.address} could not be looked at, the check ended {status}: {printable(reason)}. Nothing was "
            "submitted; --no-check submits without a look."
        )
    faults = [f"{answer.role} {answer.host}".rstrip() + f": {fault}." for answer in answers for fault in answer.faults]
    faults += differences(answers)
    if faults:
        raise ClusterError("\n".join([*faults, f"Nothing was submitted to {cluster.address}."]))
    return answers


def read_answers(log: str) -> tuple[Answer, ...]:
    """Return what the probe printed, in a driver's log among other lines."""
    documents = [json.loads(line.removeprefix(MARK)) for line in log.splitlines() if line.startswith(MARK)]
    return tuple(Answer(**{**document, "faults": tuple(document["faults"])}) for document in documents)


def differences(answers: tuple[Answer, ...]) -> list[str]:
    """Packages whose versions differ between the machines: the same job would end in other integers."""
    head, worker = answers
    pairs = [
        f"{name} {version} and {worker.versions[name]}"
        for name, version in head.versions.items()
        if worker.versions and worker.versions[name] != version
    ]
    return [f"head and worker have different versions: {', '.join(pairs)}."] if pairs else []
