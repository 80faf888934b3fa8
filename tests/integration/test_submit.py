"""Jobs on a real cluster through Ray's Jobs API: one job however often submitted, a record that outlives its driver."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.cluster.client import Cluster
from jobs.cluster.record import JobRecord, find_job, requests
from jobs.cluster.request import request_digest
from jobs.cluster.submit import cancel, job_state, portable, retry, submit, wait
from jobs.driver import run_job
from jobs.errors import ClusterError, JobError
from jobs.spec.file import parse_spec
from jobs.spec.job import JobSpec
from storage.registry import Registry
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from tests.faults.proxy import Fault, Request, faulty, refuse
from tests.integration.ray_head import RayHead, ray_head
from tests.servers.s3_server import S3Server
from tests.storage.artifacts import make_draft
from workers.executor import InProcessExecutor

Document = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ray(s3_credentials: None) -> Iterator[RayHead]:
    with pytest.MonkeyPatch.context() as patch, ray_head(num_cpus=2) as head:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield head


@pytest.fixture
def head(ray: RayHead) -> str:
    return ray.address


def spec(checkpoint: Path, uri: str, **keys: Any) -> JobSpec:
    document = {
        "name": "tiny",
        "model": {
            "library": "timm",
            "arch": "test_resnet",
            "kwargs": {"num_classes": 10, "in_chans": 3},
            "checkpoint": str(checkpoint),
        },
        "preprocess": {"size": 32},
        "quantize": {"recipe": "paper"},
        "store": {"uri": uri},
        "cluster": {"task_weights": 50_000},
        **keys,
    }
    return parse_spec(document, where="test")


def test_a_job_runs_on_the_cluster_once_however_often_it_is_submitted(
    head: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    here = run_job(spec(tiny_checkpoint, str(tmp_path / "here")), InProcessExecutor())
    asked = spec(tiny_checkpoint, str(tmp_path / "there"))
    record, attempt, new = submit(asked, head)
    again, same, renewed = submit(asked.model_copy(update={"cluster": here_cluster(asked)}), head)
    assert (new, renewed) == (True, False)
    assert (again.request, same) == (record.request, attempt)
    assert re.fullmatch(f"{record.request.removeprefix('sha256:')}-1-[0-9a-f]{{8}}", attempt.submission_id)

    seen: list[str] = []
    state = wait(record, pending_timeout_s=300, on_state=lambda one: seen.append(one.status))
    assert state.status == "SUCCEEDED", (state.message, state.end and state.end.traceback)
    assert set(seen) <= {"PENDING", "RUNNING", "SUCCEEDED"}
    assert state.end is not None
    assert state.end.result is not None
    assert state.end.result.digest == here.digest
    assert state.end.result.work.reused == 0

    third = submit(asked, head)
    assert third[1:] == (attempt, False)  # done is done
    log = record.log(1)
    assert log is not None
    lines = [json.loads(line) for line in log.splitlines()]
    assert {(line["job"], line["model"], line["attempt"]) for line in lines} == {(record.request, "test_resnet", 1)}
    assert (lines[-1]["kind"], lines[-1]["digest"]) == ("succeeded", here.digest)

    store = str(tmp_path / "there")
    short = record.request.removeprefix("sha256:")[:8]
    told = CliRunner().invoke(app, ["jobs", "result", short, "--store", store, "--json"])
    assert json.loads(told.stdout)["digest"] == here.digest
    listed = CliRunner().invoke(app, ["jobs", "ls", "--store", store, "--json"])
    assert [(row["job"], row["status"], row["name"]) for row in json.loads(listed.stdout)] == [
        (record.request, "SUCCEEDED", "tiny")
    ]


def test_a_job_leaves_metrics_and_json_logs_with_job_and_layers(
    ray: RayHead, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    record, _, _ = submit(spec(tiny_checkpoint, str(tmp_path / "s"), name="observed"), ray.address)
    text = ""

    def read(_: Any) -> None:
        nonlocal text
        with urllib.request.urlopen(ray.metrics, timeout=10) as answer:
            text += answer.read().decode()

    state = wait(record, on_state=read)
    assert state.end is not None
    assert state.end.result is not None
    give_up = time.monotonic() + 20
    while "ray_nestquant_units" not in text and time.monotonic() < give_up:
        time.sleep(0.5)
        read(None)
    assert re.search(r'ray_nestquant_tasks(_total)?{[^}]*function="run_bundle"[^}]*} [1-9]', text)
    assert re.search(r'ray_nestquant_units(_total)?{[^}]*reused="false"[^}]*} [1-9]', text)
    assert re.search(r'ray_nestquant_bytes(_total)?{[^}]*direction="written"[^}]*} [1-9]', text)

    lines = [line for path in ray.logs.glob("worker-*") for line in path.read_text(errors="replace").splitlines()]
    stored = [
        found
        for line in lines
        if '"unit stored"' in line and (found := json.loads(line))["job"] == state.end.result.job
    ]
    assert len(stored) == state.end.result.work.units
    layers = {layer for line in stored for layer in line["layers"]}
    assert layers == {layer.name for layer in state.end.result.layers}


@pytest.mark.slow
def test_a_lost_race_for_a_number_and_a_retried_task_are_counted(
    ray: RayHead, moto_s3: S3Server, tiny_checkpoint: Path
) -> None:
    """Somebody publishes version 1 while the driver's own is on its way; a worker hears 503 for what it has stored."""
    direct = moto_s3.uri(max_attempts=1)
    theirs = Registry(open_store(direct))
    draft = make_draft(theirs, name="tiny", groups=1)
    met: list[str] = []

    def meet(request: Request) -> Fault | None:
        if request.method != "PUT":
            return None
        if "/versions/00000001.json" in request.path and "race" not in met:
            met.append("race")
            theirs.publish(draft)
        if "/units/" in request.path and "retry" not in met:
            met.append("retry")
            return refuse(503, "SlowDown")
        return None

    text = ""
    with faulty(moto_s3.endpoint_url, meet) as proxy:
        through = direct.replace(moto_s3.endpoint_url.rpartition(":")[2], proxy.url.rpartition(":")[2])
        record, _, _ = submit(spec(tiny_checkpoint, through), ray.address)

        def read(_: Any) -> None:
            nonlocal text
            with urllib.request.urlopen(ray.metrics, timeout=10) as answer:
                text += answer.read().decode()

        state = wait(record, on_state=read)
    assert state.end is not None
    assert state.end.result is not None, state.end.traceback
    assert (state.end.result.version, sorted(met)) == (2, ["race", "retry"])
    assert state.end.result.work.reused >= 1  # it was stored, though the answer said otherwise
    for outcome in ("created", "lost race"):
        assert re.search(rf'ray_nestquant_commits(_total)?{{[^}}]*outcome="{outcome}"[^}}]*}} 1', text), outcome
    assert re.search(r'ray_tasks{[^}]*IsRetry="1"[^}]*}', text)


def here_cluster(asked: JobSpec) -> Any:
    return asked.cluster.model_copy(update={"max_retries": 1})


@pytest.mark.slow
def test_a_cancelled_job_is_retried_and_only_the_rest_is_done(head: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    here = run_job(spec(tiny_checkpoint, str(tmp_path / "here"), store=fine(tmp_path / "here")), InProcessExecutor())
    asked = spec(tiny_checkpoint, "", store=fine(tmp_path / "there"), cluster={"task_weights": 1})
    record, attempt, _ = submit(asked, head)
    units = tmp_path / "there" / "jobs" / here.job.removeprefix("sha256:") / "units"
    give_up = time.monotonic() + 240
    while len(list(units.glob("*.json"))) < 3 and time.monotonic() < give_up:
        time.sleep(0.05)
    stopped = cancel(record)
    assert stopped.status in ("STOPPED", "SUCCEEDED")
    if stopped.status == "STOPPED":
        assert Cluster(head).status(attempt)[0] in ("STOPPED", "FAILED")
        finished = len(list(units.glob("*.json")))
        time.sleep(2)
        assert len(list(units.glob("*.json"))) == finished  # no orphan goes on working
        _, second, new = retry(record, Cluster(head))
        assert (second.number, new) == (2, True)
        state = wait(record, on_state=lambda _: None)
        assert state.end is not None
        assert state.end.result is not None, state.end.traceback
        assert (state.status, state.end.result.digest) == ("SUCCEEDED", here.digest)
        assert state.end.result.work.reused == finished


def fine(folder: Path) -> dict[str, Any]:
    return {"uri": str(folder), "shard_bytes": 4096}


@pytest.mark.slow
def test_a_failing_job_leaves_its_error_and_traceback_in_the_store(
    head: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    record, _, _ = submit(spec(tiny_checkpoint, str(tmp_path / "s"), quantize={"ignore": ["nothing.*"]}), head)
    state = wait(record, on_state=lambda _: None)
    assert state.status == "FAILED"
    assert state.message is not None
    assert state.message.startswith("quantize.ignore: 'nothing.*' matches none of the")
    assert state.end is not None
    assert "PlanError" in (state.end.traceback or "")


def test_two_submitters_claim_an_attempt_once() -> None:
    record = JobRecord(MemoryStore(), f"sha256:{'1' * 64}")
    first, second = record.claim(1, "http://a"), record.claim(1, "http://b")
    assert first is not None
    assert second is None
    assert record.latest() == first
    assert re.fullmatch(f"{'1' * 64}-1-[0-9a-f]{{8}}", first.submission_id)
    elsewhere = JobRecord(MemoryStore(), record.request).claim(1, "http://a")
    assert elsewhere is not None
    assert elsewhere.submission_id != first.submission_id  # one cluster may serve both stores


def test_a_cluster_out_of_reach_is_one_clear_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"No Jobs API at http://127.0.0.1:9: "):
        submit(spec(tiny_checkpoint, str(tmp_path / "s")), "http://127.0.0.1:9")
    assert not (tmp_path / "s").exists()


def test_a_job_whose_cluster_is_gone_is_lost_until_it_has_left_its_end(tiny_checkpoint: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "s"))
    asked = spec(tiny_checkpoint, store.uri)
    record = JobRecord(store, request_digest(asked))
    assert record.ask(asked) == asked
    record.claim(1, "http://127.0.0.1:9")
    record.beat(1, "quantize", 3, 9)
    state = job_state(record)
    assert (state.status, state.progress and state.progress.done) == ("LOST", 3)
    assert requests(store) == [record.request]
    assert find_job(store, record.request[7:15]).request == record.request
    with pytest.raises(JobError, match="6 or more of its digits"):
        find_job(store, record.request[7:10])


def test_local_inputs_go_into_the_store_under_their_digest(tiny_checkpoint: Path) -> None:
    store = MemoryStore.named("portable")
    moved = portable(spec(tiny_checkpoint, "memory://portable"), store)
    assert moved.model.checkpoint is not None
    place, name = moved.model.checkpoint.rsplit("/inputs/", 1)
    assert place == store.uri
    assert name.endswith(".safetensors")
    assert store.get(f"inputs/{name}") == tiny_checkpoint.read_bytes()


def test_a_folder_of_images_cannot_travel_and_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = spec(tiny_checkpoint, "memory://portable2", evaluate={"data": str(tmp_path)})
    with pytest.raises(
        JobError, match=r"evaluate.data: .* is a folder on this machine; give a tar, an npz or an s3:// URI"
    ):
        portable(asked, MemoryStore.named("portable2"))
