"""A look around before a job goes to a cluster: ``python -m jobs.cluster.probe QUESTION``, on the head and on a worker.

It asks what only those machines can tell: which packages they have, whether the store and the inputs are there for
*their* credentials. Prints one line for each machine, JSON behind ``MARK``; ``jobs.cluster.preflight`` reads them.
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict, dataclass
from functools import partial

from jobs.cluster.record import JobRecord
from jobs.cluster.request import object_revision
from jobs.executors import open_executor
from jobs.spec.job import ClusterSpec
from jobs.versions import tool_versions
from storage.errors import StorageError
from storage.stores.uri import open_store
from workers.errors import WorkerLost, WorkError, one_line
from workers.inputs.files import local_path

MARK = "nestquant-probe "
PACKAGES = ("ray", "torch", "torchvision", "timm", "pytorchcv", "numpy", "numba", "safetensors", "zstandard", "boto3")
"""What a worker imports; on all machines of one version, as integers may depend on it."""


@dataclass(frozen=True)
class Question:
    """What a machine is asked: the store, the job whose record stands there, and inputs as ``(key, URI)``.

    A worker is waited for as long as the job would wait, since a cluster may have to bring up its first node.
    """

    store: str
    request: str
    inputs: tuple[tuple[str, str], ...]
    cpus_per_task: float
    node_timeout_s: float


@dataclass(frozen=True)
class Answer:
    """What one machine has to say; each fault is a line."""

    role: str
    host: str
    versions: dict[str, str]
    faults: tuple[str, ...]


def look(question: Question, role: str) -> Answer:
    """Look around on this machine; ``role`` is what messages call it."""
    versions = tool_versions(PACKAGES)
    absent = [name for name in PACKAGES if versions[name] == "not installed"]
    faults = [f"{', '.join(absent)} not installed; install nestquant-service[service] there"] if absent else []
    faults += _store_faults(question, role)
    faults += [fault for key, uri in question.inputs if (fault := _input_fault(key, uri)) is not None]
    return Answer(role, socket.gethostname(), versions, tuple(faults))


def _store_faults(question: Question, role: str) -> list[str]:
    """Read the job's record, which the submitter has just written, and write beside it."""
    try:
        store = open_store(question.store)
        record = JobRecord(store, question.request)
        if not store.exists(record.spec_key):
            return [f"{store.uri} is there, without what was just written to it: is it a folder that is not shared?"]
        key = f"{record.prefix}/probe.{role}"
        store.put(key, socket.gethostname().encode(), mode="overwrite")
        store.delete(key)
    except (StorageError, OSError) as error:
        return [str(error).rstrip(".")]
    return []


def _input_fault(key: str, uri: str) -> str | None:
    try:
        if uri.startswith("s3://"):
            object_revision(uri)
        elif not local_path(uri).exists():
            return f"{key}: no file at {uri}; expected a folder that all machines share, or an s3:// URI"
    except (StorageError, WorkError, OSError) as error:
        return f"{key}: {str(error).rstrip('.')}"
    return None


def main() -> int:
    """Look around here, then on a worker; the exit code says whether both could be asked."""
    document = json.loads(sys.argv[1])
    question = Question(**{**document, "inputs": tuple(map(tuple, document["inputs"]))})
    _print(look(question, "head"))
    cluster = ClusterSpec(address="auto", cpus_per_task=question.cpus_per_task, node_timeout_s=question.node_timeout_s)
    try:
        with open_executor(cluster, local=False) as executor:
            for _, answer in executor.map(partial(look, role="worker"), [question]):
                _print(answer)
    except WorkerLost:
        fault = (
            f"no node could run a task with {question.cpus_per_task:g} CPUs; see cluster.cpus_per_task, node_timeout_s"
        )
        _print(Answer("worker", "", {}, (fault,)))
    except (WorkError, StorageError) as error:
        _print(Answer("worker", "", {}, (str(error).rstrip("."),)))
    except Exception as error:  # what a worker cannot import is raised here, as whatever Ray makes of it
        _print(Answer("worker", "", {}, (one_line(error),)))
    return 0


def _print(answer: Answer) -> None:
    print(MARK + json.dumps(asdict(answer), sort_keys=True), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.exit(main())
