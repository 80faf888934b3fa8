"""Time and memory from 1 M to 1 B weights in one model: ``python -m tests.benchmarks.bench_scale [ARCH ...]``.

Vision transformers on a cluster of a head without CPUs and two nodes of one CPU, whose workers do not see the driver's
files: everything goes through the store, a local folder. Each job is a process of its own. It runs twice, in two
stores: with random weights, which a worker makes, and with those weights as a checkpoint of the driver's. Printed: peak
resident memory of the driver and of the largest worker, seconds by stage, bytes. A billion weights want 12 GB of memory
and 16 GB of disk; name an ARCH (``vit_giant_patch14_224``) to run one size alone.
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
from pathlib import Path
from typing import Any

from jobs.driver import run_job
from jobs.spec_file import parse_spec
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
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(wait=True, **NODE) for _ in range(2)]
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        for name in names or ARCHS:
            with tempfile.TemporaryDirectory(prefix="nestquant-scale-") as scratch:
                _measure(name, Path(scratch), cluster.gcs_address, raylets)
    finally:
        cluster.shutdown()


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
        "store": {"uri": str(store)},
        "cluster": {"address": address},
    }
    watch = _Workers(raylets)
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "tests.benchmarks.bench_scale", "--driver", json.dumps(spec)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=JOB_S, check=False)
    worker_peak = watch.stop()
    if ended.returncode != 0:
        raise SystemExit(f"{name}: {ended.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ended.stdout)
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
    from workers.remote import RayExecutor, RaySettings

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


def _import_all() -> None:
    """What the job imports is no growth of it."""
    from workers import zoo

    zoo.build("timm", "test_vit", meta=True)


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
    """The resident memory of the largest process that the raylets started."""

    def __init__(self, raylets: list[int]) -> None:
        self.raylets = raylets
        super().__init__()

    def figure(self) -> int:
        children = [
            pid for raylet in self.raylets for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        ]
        return max((_memory(pid).get("VmRSS", 0) for pid in children), default=0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]:
        print(json.dumps(driver(json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])
