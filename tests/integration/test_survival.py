"""A job on a cluster of several nodes that lose workers, nodes and the driver: the same bytes in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster

from jobs.driver import run_job
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from storage.stores.uri import open_store
from tests.faults.proxy import faulty
from tests.servers.s3_server import S3Server
from workers.executor import InProcessExecutor

NODE = {"num_cpus": 1, "memory": 2_000_000_000, "object_store_memory": 100_000_000}
START_S = 240
AWAY_S = 30


def document(uri: Path | str, **cluster: Any) -> dict[str, Any]:
    """ResNet-18, 11.7 M random weights, cut into more than a hundred shards: enough to be interrupted in."""
    return {
        "name": "resnet18",
        "model": {"library": "timm", "arch": "resnet18", "random_seed": 0},
        "quantize": {"recipe": "paper"},
        "store": {"uri": str(uri), "shard_bytes": 65536},
        "cluster": {"task_weights": 1, **cluster},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    uri = tmp_path_factory.mktemp("undisturbed") / "store"
    return run_job(parse_spec(document(uri), where="test"), InProcessExecutor())


@contextmanager
def running(nodes: int, **environment: str) -> Iterator[Cluster]:
    """Run a head without CPUs and nodes of one CPU; drivers are processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **environment}.items():
            patch.setenv(name, value)
        head = {**NODE, "num_cpus": 0, "include_dashboard": False, "no_monitor": True}  # it does not grow by itself
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(nodes):
            made.add_node(wait=False, **NODE)
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def cluster(s3_credentials: None) -> Iterator[Cluster]:
    """Two nodes whose workers have the S3 servers' key."""
    with running(nodes=2) as made:
        yield made


class Driver:
    """``nestquant quantize`` on the cluster, in a process that can be killed."""

    def __init__(self, spec: dict[str, Any], folder: Path, job: str, *, units_in: str | None = None) -> None:
        path = folder / "spec.yaml"
        path.write_text(yaml.safe_dump(spec))
        self.store = open_store(units_in or spec["store"]["uri"])
        self.units = f"jobs/{job.removeprefix('sha256:')}/units/"
        command = [sys.executable, "-m", "jobs.cli.main", "quantize", str(path), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def done(self) -> int:
        return sum(1 for _ in self.store.list(self.units))

    def await_units(self, count: int) -> int:
        give_up = time.monotonic() + START_S
        while self.done() < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < give_up, f"{self.done()} units after {START_S} s"
            time.sleep(0.01)
        return self.done()

    def result(self) -> JobResult:
        output, errors = self.process.communicate(timeout=START_S)
        assert self.process.returncode == 0, errors
        return JobResult.model_validate(json.loads(output))


def workers_of(node: Any) -> list[int]:
    """Return the processes of a node that run tasks or wait for some; its agents are named ``ray::`` too."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = [int(pid) for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()]
    return [
        pid for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes().startswith((b"ray::_call", b"ray::IDLE"))
    ]


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_stopped(cluster: Cluster, undisturbed: JobResult, tmp_path: Path) -> None:
    spec = document(tmp_path / "store", address=cluster.gcs_address)
    first = Driver(spec, tmp_path, undisturbed.job)
    first.await_units(undisturbed.work.units // 2)
    first.process.kill()
    first.process.communicate()
    time.sleep(1)
    finished = first.done()
    assert finished < undisturbed.work.units
    time.sleep(2)
    assert first.done() == finished  # its tasks ended with it

    second = Driver(spec, tmp_path, undisturbed.job).result()
    assert second.digest == undisturbed.digest
    assert second.work.reused == finished


@pytest.mark.slow
def test_a_store_that_is_away_for_half_a_minute_changes_no_byte(
    cluster: Cluster, undisturbed: JobResult, moto_s3: S3Server, tmp_path: Path
) -> None:
    with faulty(moto_s3.endpoint_url) as proxy:
        direct = moto_s3.uri()
        through = direct.replace(moto_s3.endpoint_url.rpartition(":")[2], proxy.url.rpartition(":")[2])
        spec = document(through, address=cluster.gcs_address)
        driver = Driver(spec, tmp_path, undisturbed.job, units_in=direct)
        driver.await_units(20)
        proxy.down = True
        time.sleep(2)
        finished, asked = driver.done(), len(proxy.seen)
        time.sleep(AWAY_S)
        assert driver.done() == finished < undisturbed.work.units
        assert len(proxy.seen) > asked  # it was asked for all the while
        proxy.down = False
        result = driver.result()
    assert result.digest == undisturbed.digest
    assert result.work.units == undisturbed.work.units


@pytest.mark.slow
def test_lost_messages_change_no_byte_and_nothing_is_done_twice(undisturbed: JobResult, tmp_path: Path) -> None:
    """Requests to start a task and answers that it is done get lost on their way between driver and workers."""
    faults = {"num_failures": -1, "req_failure_prob": 5, "resp_failure_prob": 10, "in_flight_failure_prob": 0}
    lost = {"CoreWorkerService.grpc_client.PushTask": faults}
    with running(nodes=2, RAY_testing_rpc_failure=json.dumps(lost)) as cluster:
        spec = document(tmp_path / "store", address=cluster.gcs_address, max_retries=10)
        result = Driver(spec, tmp_path, undisturbed.job).result()
    assert result.digest == undisturbed.digest
    assert result.work.units == undisturbed.work.units
    assert result.work.reused > 0  # their answer was lost, and the second try found them done


@pytest.mark.slow
def test_any_number_of_workers_and_any_size_of_tasks_give_the_same_bytes(tiny_images: Path, tmp_path: Path) -> None:
    """Calibrated on images, so that the split of these counts too."""

    def spec(folder: Path, **cluster: Any) -> dict[str, Any]:
        return {
            **document(folder / "store", **cluster),
            "quantize": {"recipe": "paper", "bits": [8, 6, 4], "activations": {"observer": "mse"}},
            "preprocess": {"size": 64},
            "calibration": {"data": str(tiny_images), "samples": 40, "batch_size": 4},
        }

    here = run_job(parse_spec(spec(tmp_path / "here"), where="test"), InProcessExecutor())
    sizes = {1: 4_000_000, 2: 100_000, 4: 1, 8: 700_000}
    with running(nodes=0) as cluster:
        for workers, task_weights in sizes.items():
            while len(cluster.worker_nodes) < workers:
                cluster.add_node(wait=False, **NODE)
            cluster.wait_for_nodes(START_S)
            folder = tmp_path / str(workers)
            folder.mkdir()
            asked = spec(folder, address=cluster.gcs_address, task_weights=task_weights)
            result = Driver(asked, folder, here.job).result()
            assert result.digest == here.digest, workers
            assert result.work.reused == 0


@pytest.mark.slow
def test_a_lost_worker_and_a_lost_node_change_no_byte(cluster: Cluster, undisturbed: JobResult, tmp_path: Path) -> None:
    first, second = cluster.worker_nodes
    driver = Driver(document(tmp_path / "store", address=cluster.gcs_address), tmp_path, undisturbed.job)
    driver.await_units(3)
    for pid in workers_of(first):
        os.kill(pid, signal.SIGKILL)
    driver.await_units(10)
    cluster.remove_node(second, allow_graceful=False)
    assert driver.done() < undisturbed.work.units
    result = driver.result()
    assert result.digest == undisturbed.digest
    assert result.work.units == undisturbed.work.units


@pytest.mark.slow
def test_a_task_that_fits_no_node_is_refused_before_work_starts(cluster: Cluster, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    large = document(tmp_path / "store", address=cluster.gcs_address, cpus_per_task=64, node_timeout_s=0)
    spec.write_text(yaml.safe_dump(large))
    command = [sys.executable, "-m", "jobs.cli.main", "quantize", str(spec)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert ended.returncode == 1
    assert "GB and 64 CPUs; the largest of" in ended.stderr
    assert not (tmp_path / "store" / "jobs").exists()
