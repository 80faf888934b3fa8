"""Costs of the cluster: ``python -m tests.benchmarks.bench_cluster [SECTION ...]``, all of them by default.

``tasks``: seconds and driver CPU of an empty task. ``jobs``: seconds and driver CPU of a whole small job, in one
process and on Ray. ``workers``: one job on 1 and on 2 workers. ``evaluate``: the measurements of one job on real
images, a task a mode and a task a range of images. ``requests``: what a job asks of an S3 server (moto's), by stage,
operation and kind of key. How time and memory grow with the model: ``tests.benchmarks.bench_scale``.
"""

from __future__ import annotations

import operator
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jobs.driver import run_job
from jobs.events import Event
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from jobs.stages import evaluation
from storage.stores.blob_store import BlobStore
from storage.stores.uri import open_store
from tests.servers.requests import Requests, counted
from tests.servers.s3_server import ACCESS_KEY, SECRET_KEY, moto
from workers.executor import Executor, InProcessExecutor
from workers.inputs.checkpoint import random_state, save_state
from workers.on_ray import executor as remote
from workers.on_ray.executor import RayExecutor, RaySettings

TASKS = 3000
DEEP = 1000
JOBS = 5
REPEATS = 3
HEADS = 300
SMALL = ("timm", "test_resnet")  # 0.37 M weights
LARGE = ("timm", "resnet50")  # 25.5 M weights
BURST = 16  # tasks that find out how many workers there are, and import torch in them


def main(wanted: list[str]) -> None:
    """Print the figures that are asked for."""
    sections: dict[str, Callable[[], None]] = {
        "tasks": tasks,
        "jobs": jobs,
        "workers": workers,
        "evaluate": evaluate,
        "requests": requests,
    }
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the driver, on a machine that others use too
    for name in wanted or sections:
        print(f"\n{name} (load average {os.getloadavg()[0]:.1f} before)", flush=True)
        sections[name]()
        print(f"  load average {os.getloadavg()[0]:.1f} after", flush=True)


def tasks() -> None:
    """Empty tasks, one item each: what Ray and the driver add to every task.

    The third line stands for a large cluster: as many tasks in flight as 1,000 workers would want.
    """
    own = remote._Window.size
    for count, in_flight in ((1, None), (2, None), (2, DEEP)):
        try:
            with RayExecutor(RaySettings(num_cpus=count)) as executor:
                _warm(executor)
                if in_flight is not None:
                    remote._Window.size = lambda _: DEEP  # type: ignore[method-assign]
                begin, cpu = time.perf_counter(), time.process_time()
                assert sum(1 for _ in executor.map(operator.neg, range(TASKS))) == TASKS
                seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        finally:
            remote._Window.size = own  # type: ignore[method-assign]
        print(
            f"  {count} workers, {in_flight or 4} in flight: {TASKS / seconds:.0f} tasks/s, "
            f"{1e3 * cpu / TASKS:.2f} ms driver CPU a task, so a core feeds {TASKS / cpu:.0f} tasks/s"
        )


def jobs() -> None:
    """Whole small jobs, each with a store of its own, one after the other."""
    with tempfile.TemporaryDirectory(prefix="nestquant-bench-") as scratch:
        folder = Path(scratch)
        weights = _weights(SMALL, folder)
        _report("one process", [_timed(SMALL, weights, folder / f"p{n}", InProcessExecutor()) for n in range(JOBS + 1)])
        with RayExecutor(RaySettings(num_cpus=2)) as executor:
            _warm(executor)
            _report("Ray, 2 workers", [_timed(SMALL, weights, folder / f"r{n}", executor) for n in range(JOBS + 1)])


def workers() -> None:
    """One job, cut into one unit a task, in this process and on 1 and 2 workers: the fastest of some."""
    with tempfile.TemporaryDirectory(prefix="nestquant-bench-") as scratch:
        folder = Path(scratch)
        small, large = _weights(SMALL, folder), _weights(LARGE, folder)
        cores, digests = os.cpu_count() or 1, set[str]()
        for count in (0, 1, 2):
            name = f"{count} workers" if count else "one process"
            with RayExecutor(RaySettings(num_cpus=count)) if count else nullcontext(InProcessExecutor()) as executor:
                if count:
                    _warm(executor)
                _timed(SMALL, small, folder / f"warm{count}", executor)
                runs = [_timed(LARGE, large, folder / f"w{count}-{number}", executor) for number in range(REPEATS)]
            result, _, cpu = min(runs, key=lambda run: run[0].seconds["quantize"])
            quantize, busy = result.seconds["quantize"], result.work.worker_seconds
            others = ", ".join(f"{run[0].seconds['quantize']:.2f}" for run in runs)
            print(
                f"  {name} ({cores} cores): quantize {quantize:.2f} s (all: {others}), {result.work.units} units of "
                f"{1e3 * busy / result.work.units:.0f} ms, workers busy {100 * busy / (max(1, count) * quantize):.0f}% "
                f"of it; all stages {sum(result.seconds.values()):.2f} s, driver CPU {cpu:.2f} s"
            )
            digests.add(result.digest)
        assert len(digests) == 1


def evaluate() -> None:
    """The stage ``evaluate`` of one job, float and two levels, on the first 1,000 of the test data's real images."""
    data = Path(os.environ["NESTQUANT_TEST_DATA"])
    document = {
        "name": "bench",
        "model": {
            "library": "pytorchcv",
            "arch": "fdmobilenet_wd2",
            "checkpoint": str(data / "weights" / "fdmobilenet_wd2.safetensors"),
        },
        "quantize": {"recipe": "paper"},
        "evaluate": {"data": str(data / "images" / "imagenet_val_1300.tar"), "limit": 1000},
    }
    own = evaluation.RANGE_PIXELS
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder, RayExecutor(RaySettings(num_cpus=count)) as executor:
            _warm(executor)
            for name, pixels in (("a task a mode", 1 << 40), ("a task a range", own)):
                evaluation.RANGE_PIXELS = pixels
                spec = parse_spec({**document, "store": {"uri": f"{folder}/{name}"}}, where="bench")
                result = run_job(spec, executor)
                wall, work = result.seconds["evaluate"], sum(mode.seconds for mode in result.measured)
                print(
                    f"  {count} workers, {name}: {wall:.1f} s, images alone {work:.1f} s of workers, busy "
                    f"{work / wall / count:.0%}, right answers {[mode.correct for mode in result.measured]}",
                    flush=True,
                )
    evaluation.RANGE_PIXELS = own


def requests() -> None:
    """What one job asks of S3, counted at the client; workers that do not see this machine's files."""

    class Elsewhere(InProcessExecutor):
        same_machine = False

    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    for library, arch in (SMALL, LARGE):
        with tempfile.TemporaryDirectory() as scratch, moto(Path(scratch)) as server, counted() as sent:
            document = _document((library, arch), Path(scratch) / "unused", {"random_seed": 0})
            document["store"] = {"uri": server.uri()}
            marks: list[tuple[str, int]] = []

            def listen(event: Event, sent: Requests = sent, marks: list[tuple[str, int]] = marks) -> None:
                if event.kind == "finished":
                    marks.append((event.stage, len(sent)))

            result = run_job(parse_spec(document, where="bench"), Elsewhere(), listen)
            mine = len(sent)
            cpu = _head_cpu_s(open_store(document["store"]["uri"]))
            del sent.sent[mine:]
        _print_requests(f"{arch}: {result.sizes.weights:,} weights, {result.work.units} units", sent, marks)
        print(f"    a HEAD costs this process {1e3 * cpu:.2f} ms CPU: a core asks {1 / cpu:.0f} a second")


def _head_cpu_s(store: BlobStore) -> float:
    """Return the CPU seconds of one small request."""
    begin = time.process_time()
    for _ in range(HEADS):
        store.exists("models/bench/versions/00000001.json")
    return (time.process_time() - begin) / HEADS


def _print_requests(title: str, sent: Requests, marks: list[tuple[str, int]]) -> None:
    sizes = Counter[str]()
    for request in sent.sent:
        sizes[request.kind] += request.sent_bytes
    print(f"  {title}; {len(sent)} requests, {sum(sizes.values()):,} bytes sent")
    start = 0
    for stage, stop in [*marks, ("end", len(sent))]:
        kinds = ", ".join(
            f"{count} {operation.removesuffix('Object')} {kind}"
            for (operation, kind), count in sorted(sent.by_kind(start, stop).items())
        )
        if stop > start:
            print(f"    {stage}: {stop - start}: {kinds}")
        start = stop


def _document(model: tuple[str, str], store: Path, weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "bench",
        "model": {"library": model[0], "arch": model[1], **weights},
        "quantize": {"recipe": "paper"},
        "store": {"uri": str(store), "shard_bytes": 1 << 20},
        "cluster": {"task_weights": 1},
    }


def _weights(model: tuple[str, str], folder: Path) -> Path:
    path = folder / f"{model[1]}.safetensors"
    return path if path.exists() else save_state(random_state(*model, {}, seed=0), path)


def _timed(model: tuple[str, str], weights: Path, store: Path, executor: Executor) -> tuple[JobResult, float, float]:
    """Return the job's result, its seconds, and the CPU seconds of this process."""
    spec = parse_spec(_document(model, store, {"checkpoint": str(weights)}), where="bench")
    begin, cpu = time.perf_counter(), time.process_time()
    result = run_job(spec, executor)
    return result, time.perf_counter() - begin, time.process_time() - cpu


def _report(name: str, timed: list[tuple[JobResult, float, float]]) -> None:
    """Print the median job, the first left out."""
    result, seconds, cpu = sorted(timed[1:], key=lambda one: one[1])[len(timed[1:]) // 2]
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in result.seconds.items() if value >= 0.005)
    print(
        f"  {name}: {seconds:.2f} s a job of {result.work.units} units, {cpu:.2f} s of it CPU of this process, "
        f"{result.work.worker_seconds:.2f} s in units; stages: {stages}"
    )


def _warm(executor: Executor) -> None:
    """Let every worker start and import what tasks import."""
    list(executor.map(time.sleep, [0.2] * BURST))


if __name__ == "__main__":
    main(sys.argv[1:])
