"""Mistakes around submit, jobs and cluster.address: one line each with what was seen, expected, and what to try."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jobs.cluster.client import Cluster
from jobs.cluster.preflight import differences, read_answers
from jobs.cluster.probe import MARK, Answer
from jobs.cluster.record import JobRecord, find_job
from jobs.cluster.submit import cancel
from jobs.errors import ClusterError, JobError, SpecError
from jobs.spec.file import parse_spec
from storage.stores.memory import MemoryStore
from workers.errors import NoCluster
from workers.on_ray.executor import RayExecutor, RaySettings

SPEC = {
    "name": "x",
    "model": {"library": "timm", "arch": "test_resnet", "random_seed": 0},
    "quantize": {"recipe": "paper"},
    "store": {"uri": "memory://mistakes"},
}


@contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    """Answer every request with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        running.server_close()


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "", "http://", "head"])
def test_what_is_no_dashboard_is_refused_without_being_asked(address: str) -> None:
    with pytest.raises(ClusterError, match=r"no address of a head's dashboard; expected one such as http://head:8265"):
        Cluster(address)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b"hello", r"What answers at http://127.0.0.1:\d+ is not Ray; expected a head's dashboard"),
        (401, b"Unauthorized: Missing authentication token", r"wants a token, or another one: set RAY_AUTH_MODE=token"),
        (403, b"Forbidden: Invalid authentication token", r"wants a token, or another one: set RAY_AUTH_MODE=token"),
        (404, b"not found", r"could not be reached: Version check returned 404\. Jobs API is not supported"),
    ],
)
def test_what_answers_and_is_no_cluster_of_ours_is_told(status: int, body: bytes, told: str) -> None:
    with server(status, body) as address, pytest.raises(ClusterError, match=told) as caught:
        Cluster(address)
    assert "\n" not in str(caught.value)


def record(digits: str, store: MemoryStore) -> JobRecord:
    made = JobRecord(store, f"sha256:{digits:0<64}")
    made.ask(parse_spec(SPEC, where="test"))
    return made


def test_a_job_is_named_by_enough_digits_of_its_digest() -> None:
    store = MemoryStore("names")
    first, _ = record("abcdef1", store), record("abcdef2", store)
    for text in ("abcdef1", "ABCDEF1", "sha256:abcdef1", first.request):
        assert find_job(store, text).request == first.request
    for text in ("", "abcde", "resnet18", f"{'f' * 65}"):
        with pytest.raises(JobError, match=r"names no job: give a job's digest, or 6 or more of its digits"):
            find_job(store, text)
    for text in ("ffffff", "f" * 64):
        with pytest.raises(JobError, match=rf"No job '{text}' in memory:.*'nestquant jobs ls' lists those"):
            find_job(store, text)
    with pytest.raises(JobError, match=r"2 jobs begin with 'abcdef': abcdef100000, abcdef200000; give more digits"):
        find_job(store, "abcdef")


def test_cancelling_what_cannot_be_asked_does_not_claim_to_have_stopped_it() -> None:
    store = MemoryStore("cancel")
    asked = record("1", store)
    with pytest.raises(ClusterError, match="was never submitted: there is nothing to stop"):
        cancel(asked)
    asked.claim(1, "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match=r"Nothing was stopped: No Jobs API at http://127.0.0.1:9: .*jobs retry"):
        cancel(asked)
    assert asked.end(1) is None


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9", r"'127.0.0.1:9': nothing answers there \(Connection refused\)\. Is the cluster up"),
        ("ray://127.0.0.1:9", r"nothing answers there \(Connection refused\)"),
        (
            "http://127.0.0.1:8265",
            r"expected 'local', 'auto' .* A dashboard's http:// address is for ",
        ),
        ("head:port", r"expected 'local', 'auto' \(on a node of the cluster\) or a head's host:6379"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_at_once(address: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's Ray may be up
    with pytest.raises(NoCluster, match=told), RayExecutor(RaySettings(address=address)):
        pass


def test_a_wrong_name_is_one_line() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({**SPEC, "name": "Bad Name!"}, where="job.yaml")
    assert str(caught.value) == (
        "job.yaml: 'name': expected lower-case letters, digits, '.', '_' and '-', with a letter or digit at both ends, "
        "128 at most. Seen: 'Bad Name!'."
    )


def test_a_look_around_is_read_from_a_log_among_other_lines() -> None:
    head = Answer("head", "a", {"python": "3.11.7", "torch": "2.9.1", "timm": "1.0.31"}, ())
    worker = Answer("worker", "b", {"python": "3.11.7", "torch": "2.8.0", "timm": "1.0.31"}, ("no timm",))
    lines = ["WARNING of another", MARK + json.dumps(asdict(head)), "", MARK + json.dumps(asdict(worker))]
    assert read_answers("\n".join(lines)) == (head, worker)
    assert read_answers("Traceback ...\nModuleNotFoundError: No module named 'pydantic'") == ()
    assert differences((head, worker)) == ["head and worker have different versions: torch 2.9.1 and 2.8.0."]
    assert differences((head, Answer("worker", "b", dict(head.versions), ()))) == []
    assert differences((head, Answer("worker", "", {}, ("no node could run a task",)))) == []
