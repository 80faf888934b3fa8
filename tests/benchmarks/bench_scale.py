"""Time and memory from 1 M to 1 B weights in one model: ``python -m tests.benchmarks.bench_scale [ARCH ...]``.

Vision transformers on a cluster of a head without CPUs and two nodes of one CPU, whose workers do not see the driver's
files: everything goes through the store, a local folder. Each job is a process of its own. It runs twice, in two
stores: with random weights, which a worker makes, and with those weights as a checkpoint of the driver's. Printed: peak
resident memory of the driver and of the largest worker, seconds by stage, bytes. A billion weights want 12 GB of memory
and 16 GB of disk; name an ARCH (``vit_giant_patch14_224``) to run one size alone. ``--stage ARCH ...``, from small to
large, does in one process what a driver does before any unit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storage.layout import blob_key
from storage.manifest import parse_manifest

ARCHS = {
    "vit_tiny_patch16_224.depth2": ("vit_tiny_patch16_224", {"depth": 2}),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", {}),
    "vit_small_patch16_224": ("vit_small_patch16_224", {}),
    "vit_base_patch16_224": ("vit_base_patch16_224", {}),
    "vit_large_patch16_224": ("vit_large_patch16_224", {}),
    "vit_giant_patch14_224": ("vit_giant_patch14_224", {}),
}
NODE = {"num_cpus": 1, "memory": 9_000_000_000, "object_store_memory": 100_000_000}
JOB_S = 3000
LOOK_S = 0.2


def main(names: list[str]) -> None:
    """Print a line for each model and source of weights."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the driver, on a machine that others use too
    with cluster() as (address, raylets):
        for name in names or ARCHS:
            with tempfile.TemporaryDirectory(prefix="nestquant-scale-") as scratch:
                _measure(name, Path(scratch), address, raylets)


@contextmanager
def cluster() -> Iterator[tuple[str, list[int]]]:
    """Start a head without CPUs and two nodes of one CPU, and yield its address and the raylets that start workers."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [made.add_node(wait=True, **NODE) for _ in range(2)]
        yield str(made.gcs_address), [node.all_processes["raylet"][0].process.pid for node in nodes]
    finally:
        made.shutdown()


def _measure(name: str, folder: Path, address: str, raylets: list[int]) -> None:
    """Run a model twice; the second time the first one's weights, moved out of its store, are the checkpoint."""
    made = _run(name, folder / "made", {"random_seed": 0}, address, raylets)
    manifest = parse_manifest(
        (folder / "made/models/scale/versions/00000001.json").read_bytes(), name="scale", version=1
    )
    checkpoint = folder / "checkpoint.safetensors"
    (folder / "made" / blob_key(manifest.model.source_digest)).replace(checkpoint)
    shutil.rmtree(folder / "made")
    given = _run(name, folder / "given", {"checkpoint": str(checkpoint)}, address, raylets)
    if given["digest"] != made["digest"]:
        raise SystemExit(f"{name}: digest {given['digest']} from the checkpoint, {made['digest']} before")


def _run(name: str, store: Path, weights: dict[str, Any], address: str, raylets: list[int]) -> dict[str, Any]:
    arch, kwargs = ARCHS[name]
    spec = {
        "name": "scale",
        "model": {"library": "timm", "arch": arch, "kwargs": kwargs, **weights},
        "quantize": {"recipe": "paper"},
        "store": {"uri": str(store)},
        "cluster": {"address": address},
    }
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "tests.benchmarks.bench_scale", "--driver", json.dumps(spec)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = _Workers([process.pid, *raylets])
    output, errors = process.communicate(timeout=JOB_S)
    worker_peak = watch.stop()
    if process.returncode != 0:
        raise SystemExit(f"{name}: {errors[-3000:]}")
    found: dict[str, Any] = json.loads(output)
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found["seconds"].items() if seconds >= 0.05)
    print(
        f"{name} ({next(iter(weights))}): {found['weights'] / 1e6:.1f} M weights, {found['units']} units, "
        f"driver {found['before'] / 1e6:.0f} MB before the job, peak {found['peak'] / 1e6:.0f} MB "
        f"({found['peak_anonymous'] / 1e6:.0f} MB of its own), {found['cpu']:.1f} s CPU; "
        f"largest worker {worker_peak / 1e6:.0f} MB; {sum(found['seconds'].values()):.1f} s: {stages}; "
        f"worker seconds {found['worker_seconds']:.1f}; stored {found['stored'] / 1e6:.1f} MB, "
        f"manifest {found['manifest']:,} bytes; load average {load:.1f} to {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return found


def driver(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the job in this process and tell what it took."""
    from jobs.driver import run_job
    from jobs.spec.file import parse_spec
    from workers.on_ray.executor import RayExecutor, RaySettings

    with RayExecutor(RaySettings(address=spec["cluster"]["address"])) as executor:
        list(executor.map(time.sleep, [0.2] * 4))
        job = parse_spec(spec, where="bench_scale")
        _import_all()
        before, cpu, watch = _memory("self")["VmRSS"], time.process_time(), _Own()
        result = run_job(job, executor)
        cpu, anonymous = time.process_time() - cpu, watch.stop()
    manifest = Path(spec["store"]["uri"]) / "models/scale/versions/00000001.json"
    return {
        "digest": result.digest,
        "weights": result.sizes.weights,
        "units": result.work.units,
        "worker_seconds": result.work.worker_seconds,
        "seconds": result.seconds,
        "stored": sum(result.sizes.level_bytes) + result.sizes.base_bytes,
        "manifest": manifest.stat().st_size,
        "before": before,
        "peak": _memory("self")["VmHWM"],
        "peak_anonymous": anonymous,
        "cpu": cpu,
    }


def staging(name: str) -> str:
    """Do in this process what a driver does before any unit, with a checkpoint of zeros (a sparse file): digest, copy
    into the store, header, plan. Return one line on it.
    """
    from jobs.events import StageClock
    from jobs.spec.file import parse_spec
    from jobs.stages.preparation import prepare
    from jobs.stages.weights import outline
    from workers.executor import InProcessExecutor

    class Elsewhere(InProcessExecutor):
        same_machine = False

    with tempfile.TemporaryDirectory(prefix="nestquant-scale-") as scratch:
        checkpoint = Path(scratch) / "zeros.safetensors"
        arch, kwargs = ARCHS[name]
        spec = parse_spec(
            {
                "name": "scale",
                "model": {"library": "timm", "arch": arch, "kwargs": kwargs, "checkpoint": str(checkpoint)},
                "quantize": {"recipe": "paper"},
                "store": {"uri": str(Path(scratch) / "store")},
            },
            where="bench_scale",
        )
        size = _write_zeros(checkpoint, outline(spec.model).state_dict())
        before, cpu, watch, clock = _memory("self")["VmRSS"], time.process_time(), _Own(), StageClock(lambda _: None)
        prepared = prepare(spec, Elsewhere(), Path(scratch), clock)
        cpu, anonymous = time.process_time() - cpu, watch.stop()
    return (
        f"{name}, before any unit: {size / 1e6:.0f} MB staged, {len(prepared.plan.groups) + len(prepared.plan.base)} "
        f"units planned, driver {before / 1e6:.0f} MB before, peak {_memory('self')['VmHWM'] / 1e6:.0f} MB "
        f"({anonymous / 1e6:.0f} MB of its own), {cpu:.1f} s CPU, stage {clock.seconds['stage']:.1f} s, "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def _write_zeros(path: Path, state: Mapping[str, Any]) -> int:
    """Write a safetensors file of zeros and return its length; the data is a hole."""
    header, offset = dict[str, Any](), 0
    for name, tensor in state.items():
        kind = {"torch.float32": "F32", "torch.int64": "I64"}[str(tensor.dtype)]
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        return file.truncate(8 + len(text) + offset)


def _import_all() -> None:
    """What the job imports is no growth of it."""
    from workers.inputs import networks

    networks.build("timm", "test_vit", meta=True)


def _memory(pid: int | str) -> dict[str, int]:
    """Return the Vm* and Rss* lines of a process in bytes; none where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("VmRSS", "VmHWM", "Rss")))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}


class _Watch:
    """Looks again and again, in a thread, and keeps the largest figure."""

    def __init__(self) -> None:
        self.peak, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(LOOK_S):
            self.peak = max(self.peak, self.figure())

    def figure(self) -> int:
        raise NotImplementedError

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self.peak


class _Own(_Watch):
    """This process's anonymous memory: without the pages of mapped files, which the kernel takes back when it needs
    them.
    """

    def figure(self) -> int:
        return _memory("self")["RssAnon"]


class _Workers(_Watch):
    """The resident memory of the largest worker: a process that a raylet, or the driver itself, started."""

    def __init__(self, parents: list[int]) -> None:
        self.parents = parents
        super().__init__()

    def figure(self) -> int:
        return max((_memory(pid).get("VmRSS", 0) for pid in self._workers()), default=0)

    def _workers(self) -> Iterator[int]:
        for parent in self.parents:
            for children in Path(f"/proc/{parent}/task").glob("*/children"):  # a pool starts its processes in a thread
                with suppress(OSError):
                    yield from map(int, children.read_text().split())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]:
        print(json.dumps(driver(json.loads(sys.argv[2]))))
    elif sys.argv[1:2] == ["--stage"]:
        for arch in sys.argv[2:]:
            print(staging(arch), flush=True)
    else:
        main(sys.argv[1:])
