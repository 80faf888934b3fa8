"""A job on a cluster of several nodes that lose workers, nodes and the driver: the same bytes in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster

from jobs.driver import run_job
from jobs.result import JobResult
from jobs.spec import parse_spec
from workers.executor import InProcessExecutor

NODE = {"num_cpus": 1, "memory": 2_000_000_000, "object_store_memory": 100_000_000}
START_S = 240


def document(uri: Path, **cluster: Any) -> dict[str, Any]:
    """ResNet-18, 11.7 M random weights, cut into more than a hundred shards: enough to be interrupted in."""
    return {
        "name": "resnet18",
        "model": {"library": "timm", "arch": "resnet18", "random_seed": 0},
        "store": {"uri": str(uri), "shard_bytes": 65536},
        "cluster": {"task_weights": 1, **cluster},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    uri = tmp_path_factory.mktemp("undisturbed") / "store"
    return run_job(parse_spec(document(uri), where="test"), InProcessExecutor())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one CPU; drivers are processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            made.add_node(wait=False, **NODE)
        yield made
        made.shutdown()


class Driver:
    """``nestquant quantize`` on the cluster, in a process that can be killed."""

    def __init__(self, cluster: Cluster, folder: Path, job: str) -> None:
        spec = folder / "spec.yaml"
        spec.write_text(yaml.safe_dump(document(folder / "store", address=cluster.gcs_address)))
        self.units = folder / "store" / "jobs" / job.removeprefix("sha256:") / "units"
        command = [sys.executable, "-m", "jobs.cli", "quantize", str(spec), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def done(self) -> int:
        return len(list(self.units.glob("*.json")))

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
    first = Driver(cluster, tmp_path, undisturbed.job)
    first.await_units(undisturbed.work.units // 2)
    first.process.kill()
    first.process.communicate()
    time.sleep(1)
    finished = first.done()
    assert finished < undisturbed.work.units
    time.sleep(2)
    assert first.done() == finished  # its tasks ended with it

    second = Driver(cluster, tmp_path, undisturbed.job).result()
    assert second.digest == undisturbed.digest
    assert second.work.reused == finished


@pytest.mark.slow
def test_a_lost_worker_and_a_lost_node_change_no_byte(cluster: Cluster, undisturbed: JobResult, tmp_path: Path) -> None:
    first, second = cluster.worker_nodes
    driver = Driver(cluster, tmp_path, undisturbed.job)
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
    command = [sys.executable, "-m", "jobs.cli", "quantize", str(spec)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert ended.returncode == 1
    assert "GB and 64 CPUs; the largest of" in ended.stderr
    assert not (tmp_path / "store" / "jobs").exists()
