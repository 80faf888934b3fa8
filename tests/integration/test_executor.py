"""The Ray executor alone: failures, time-outs, cancelling, sharing between threads."""

from __future__ import annotations

import math
import operator
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from jobs.driver import run_job
from jobs.events import Event
from jobs.spec.file import parse_spec
from workers.errors import DoesNotFit, Need, Stopped, WorkError
from workers.executor import InProcessExecutor
from workers.inputs.tensors import TensorReader
from workers.on_ray.deadline import TaskTimeout
from workers.on_ray.executor import RayExecutor, RaySettings
from workers.tasks import TensorSource

Document = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_more_items_than_the_window_all_come_back_once() -> None:
    with RayExecutor(RaySettings(max_in_flight=3)) as executor:
        results = dict(executor.map(math.factorial, range(20)))
    assert results == {index: math.factorial(index) for index in range(20)}


def test_a_failure_is_raised_as_itself_after_what_was_in_flight() -> None:
    seen: dict[int, float] = {}
    with (
        RayExecutor(RaySettings(max_in_flight=2)) as executor,
        pytest.raises(ValueError, match=r"math domain error|expected a nonnegative"),
    ):
        seen.update(executor.map(math.sqrt, [4.0, -1.0, 9.0, *[16.0] * 30]))
    assert seen[0] == 2.0
    assert len(seen) < 10  # the rest was never submitted


def test_a_task_beyond_its_time_is_ended_where_it_runs() -> None:
    begin = time.monotonic()
    with RayExecutor(RaySettings(task_timeout_s=1)) as executor:
        with pytest.raises(TaskTimeout, match=r"no result after 1 s.*cluster\.task_timeout_s"):
            list(executor.map(time.sleep, [120]))
        assert time.monotonic() - begin < 100
        assert list(executor.map(time.sleep, [0])) == [(0, None)]  # its worker serves on


def test_stop_cancels_what_runs_in_every_thread() -> None:
    with RayExecutor(RaySettings()) as executor:
        caught: list[BaseException] = []

        def work() -> None:
            try:
                list(executor.map(time.sleep, [600] * 6))
            except Stopped as error:
                caught.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        give_up = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0) > 0 and time.monotonic() < give_up:
            time.sleep(0.1)
        executor.stop()
        for thread in threads:
            thread.join(90)
        assert [type(error) for error in caught] == [Stopped, Stopped]
        give_up = time.monotonic() + 30
        while ray.available_resources().get("CPU") != 2 and time.monotonic() < give_up:
            time.sleep(0.1)
        assert ray.available_resources()["CPU"] == 2  # no orphan holds a CPU
        with pytest.raises(Stopped):
            list(executor.map(operator.neg, [1]))


def test_threads_share_one_executor() -> None:
    results: dict[int, list[tuple[int, int]]] = {}
    with RayExecutor(RaySettings()) as executor:

        def work(sign: int) -> None:
            results[sign] = sorted(executor.map(operator.neg, [sign * value for value in range(10)]))

        threads = [threading.Thread(target=work, args=(sign,)) for sign in (1, -1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {sign: [(index, -sign * index) for index in range(10)] for sign in (1, -1, 2)}


def test_a_task_too_large_for_every_node_is_refused() -> None:
    with RayExecutor(RaySettings()) as executor:
        executor.require(Need("quantize", 1, "store.shard_bytes"))
        with pytest.raises(
            DoesNotFit,
            match=r"stage 'quantize' needs 1000000.0 GB and 1 CPUs; the largest of 1 nodes .*\(store.shard_bytes, ",
        ):
            executor.require(Need("quantize", 10**15, "store.shard_bytes"))
    with pytest.raises(DoesNotFit, match=r"this machine has"):
        InProcessExecutor().require(Need("quantize", 10**15, "store.shard_bytes"))


def test_a_poisoned_layer_fails_the_job_with_its_name_and_keeps_the_others(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The values rot after the plan was made, unseen by the file's times: the worker that reads them says so."""
    checkpoint = tmp_path / "poisoned.safetensors"
    checkpoint.write_bytes(tiny_checkpoint.read_bytes())
    tensors = TensorReader(TensorSource(None, str(checkpoint))).tensors
    poisoned = next(name for name, info in reversed(tensors.items()) if len(info.shape) == 4)
    document = {
        "name": "poisoned",
        "model": {
            "library": "timm",
            "arch": "test_resnet",
            "kwargs": {"num_classes": 10, "in_chans": 3},
            "checkpoint": str(checkpoint),
        },
        "preprocess": {"size": 32},
        "quantize": {"recipe": "paper"},
        "store": {"uri": str(tmp_path / "store"), "shard_bytes": 16384},
        "cluster": {"task_weights": 1},
    }

    def poison(event: Event) -> None:
        if (event.kind, event.stage) == ("finished", "plan"):
            times = checkpoint.stat()
            with checkpoint.open("r+b") as file:
                file.seek(tensors[poisoned].start)
                file.write(np.full(4, np.nan, dtype=np.float32).tobytes())
            os.utime(checkpoint, ns=(times.st_atime_ns, times.st_mtime_ns))

    with RayExecutor(RaySettings()) as executor, pytest.raises(WorkError) as caught:
        run_job(parse_spec(document, where="test"), executor, poison)
    assert f"tensor '{poisoned}' holds NaN" in str(caught.value)
    assert "_store_group" in str(caught.value.__cause__)  # the worker's traceback
    assert len(list((tmp_path / "store").glob("jobs/*/units/*.json"))) > 3
    assert not (tmp_path / "store" / "models").exists()


def test_weights_that_a_worker_makes_are_those_of_one_process(tmp_path: Path) -> None:
    def job(store: str) -> Any:
        document = {
            "name": "made",
            "model": {"library": "timm", "arch": "test_resnet", "random_seed": 5},
            "quantize": {"recipe": "paper"},
            "store": {"uri": str(tmp_path / store), "shard_bytes": 65536},
        }
        return parse_spec(document, where="test")

    with RayExecutor(RaySettings()) as executor:
        spread = run_job(job("ray"), executor)
    assert spread.digest == run_job(job("alone"), InProcessExecutor()).digest
    assert spread.work.reused == 0
