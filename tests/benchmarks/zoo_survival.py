"""A zoo on a cluster of three nodes, killed twice, resumed, finished: ``python -m tests.benchmarks.zoo_survival``.

A head without CPUs and two nodes of one CPU run ``nestquant zoo``, a process of its own, over 24 architectures: the six
with real weights of the test data, the three CIFAR ones measured, the others with random weights. When so many rows
are there the driver gets SIGKILL; before the second time a node is removed as well, and the zoo ends on the node that
is left. Then it is held to this, and the exit code tells:

* what had its row at a kill is skipped afterwards, and its row is the same to the byte; nothing else is skipped;
* every job ends as done;
* each manifest has the digest that the same job gets alone in one process.

The table goes to ``docs/results/zoo.md`` and ``zoo.csv`` with ``--write``, the report to ``FOLDER/zoo.html``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jobs.cluster.request import request_digest
from jobs.driver import run_job
from jobs.result import JobResult
from jobs.spec.zoo import ZooJob, load_zoo
from jobs.zoo.ledger import ROWS, ZooLedger, parse_rows
from jobs.zoo.row import ZooRow
from storage.registry import Registry
from storage.stores.uri import open_store
from tests.benchmarks.accuracy_table import CIFAR, CIFAR_VIT, DATA, IMAGENET, ROOT, VIT_KWARGS
from workers.executor import InProcessExecutor

NODE = {"num_cpus": 1, "memory": 2_000_000_000, "object_store_memory": 100_000_000}
RANDOM = (
    *("timm/resnet18", "timm/mobilenetv2_100", "timm/mobilenetv3_small_100", "timm/efficientnet_b0"),
    *(
        "timm/ghostnet_100",
        "timm/regnety_002",
        "timm/mnasnet_small",
        "timm/deit_tiny_patch16_224",
        "timm/convnext_atto",
    ),
    *("timm/mobilevit_xxs", "timm/edgenext_xx_small", "timm/levit_128s", "timm/pit_ti_224"),
    *("pytorchcv/mobilenet_wd4", "pytorchcv/shufflenetv2_wd2", "pytorchcv/preresnet10", "pytorchcv/igcv3_wd4"),
    "pytorchcv/squeezenet_v1_0",
)
ROW_S = 600.0
GRACE_S = 3.0


class Broken(Exception):
    """A promise that did not hold."""


def document(folder: Path) -> dict[str, Any]:
    """Return the zoo's spec, all but the cluster's address."""
    weights, images = DATA / "weights", DATA / "images"
    measured = {
        "evaluate": {"data": str(images / "cifar10_test_1000.npz"), "limit": 300},
        "calibration": {"data": str(images / "cifar10_train_4000.npz"), "samples": 64},
        "recipes": ["w8-4", "w8-4a8"],
    }

    def real(arch: str, preprocess: dict[str, Any], **keys: Any) -> dict[str, Any]:
        library = keys.pop("library", "pytorchcv")
        file = keys.pop("file", arch)
        checkpoint = str(weights / f"{file}.safetensors")
        return {"models": f"{library}/{arch}", "checkpoint": checkpoint, "preprocess": preprocess, **keys}

    vit = {"library": "timm", "file": "vit_cifar10_p4_d128_l4", "kwargs": VIT_KWARGS}
    return {
        "name": "survival",
        "store": {"uri": str(folder / "store"), "shard_bytes": 131072},
        "models": [
            *({"models": name, "random_seed": 0, "recipes": ["w8-4"]} for name in RANDOM[: len(RANDOM) // 2]),
            real("resnet20_cifar10", CIFAR, **measured),
            real("resnet56_cifar10", CIFAR, **measured),
            real("vit_tiny_patch16_224", CIFAR_VIT, **vit, **measured),
            *(
                real(arch, IMAGENET, recipes=["w8-4"])
                for arch in ("fdmobilenet_wd2", "menet108_8x1_g3", "squeezenet_v1_1")
            ),
            *({"models": name, "random_seed": 0, "recipes": ["w8-4"]} for name in RANDOM[len(RANDOM) // 2 :]),
        ],
        "recipes": {
            "w8-4": {"recipe": "paper", "bits": [8, 4]},
            "w8-4a8": {"recipe": "paper", "bits": [8, 4], "activations": {"bits": 8}},
        },
        "cluster": {"task_weights": 250_000, "node_timeout_s": 60},
        "max_models": 3,
    }


@contextmanager
def cluster() -> Iterator[Any]:
    """Start a head without CPUs and two nodes of one CPU."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the driver, on a machine that others use too
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(wait=False, **NODE)
        yield made
    finally:
        made.shutdown()


@dataclass
class Run:
    """One life of the zoo's driver."""

    skipped: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    seconds: float = 0.0
    killed: bool = False


class Zoo:
    """The zoo's driver as a child process, and what it left."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.results = folder, folder / "results"
        self.path = folder / "zoo.yaml"
        spec = document(folder)
        spec["cluster"]["address"] = address
        self.path.write_text(yaml.safe_dump(spec, sort_keys=False))
        loaded, self.jobs = load_zoo(self.path)
        self.ledger = ZooLedger(open_store(loaded.store.uri), loaded.name)
        self.requests = {request_digest(job.spec): job for job in self.jobs}
        self.lives = 0

    def rows(self) -> list[ZooRow]:
        """Return the table as it stands in the folder."""
        file = self.results / ROWS
        return parse_rows(file.read_bytes()) if file.exists() else []

    def row_count(self) -> int:
        """Return how many rows stand there, without reading them."""
        file = self.results / ROWS
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def finished(self) -> dict[str, ZooRow]:
        """Return the rows in the store by the name of their job."""
        return {row.name: row for row in self.ledger.finished_of(self.requests).values()}

    def live(self, *, until_rows: int | None, lose: Any = None) -> Run:
        """Run the driver to its end, or to SIGKILL once ``until_rows`` rows are there; ``lose()`` comes two rows
        before that.
        """
        self.lives += 1
        events, errors = self.folder / f"events{self.lives}.jsonl", self.folder / f"errors{self.lives}.txt"
        command = [
            sys.executable,
            "-m",
            "jobs.cli.main",
            "zoo",
            str(self.path),
            "--results",
            str(self.results),
            "--json",
        ]
        begin = time.monotonic()
        with events.open("w") as output, errors.open("w") as told:
            process = subprocess.Popen(command, stdout=output, stderr=told)
            try:
                killed = until_rows is not None and self._kill(process, until_rows, lose)
                code = process.wait(ROW_S * 3)
            finally:
                process.kill()
        if not killed and code != 0:
            raise Broken(f"the zoo ended with {code}: {errors.read_text()[-2000:]}")
        run = Run(seconds=time.monotonic() - begin, killed=killed)
        for line in events.read_text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # cut by the kill
                continue
            if event["event"] in ("skipped", "ended"):
                getattr(run, event["event"]).add(event["name"])
        return run

    def _kill(self, process: subprocess.Popen[bytes], until_rows: int, lose: Any) -> bool:
        for wanted, act in ((until_rows - 2, lose), (until_rows, process.kill)):
            if act is None:
                continue
            give_up = time.monotonic() + ROW_S
            while self.row_count() < wanted:
                if process.poll() is not None or time.monotonic() > give_up:
                    raise Broken(f"{self.row_count()} rows, {wanted} expected before the kill")
                time.sleep(0.05)
            act()
        if process.wait(60) != -signal.SIGKILL:
            raise Broken(f"the driver ended with {process.returncode} before it could be killed")
        time.sleep(GRACE_S)  # Ray ends the tasks of a driver that is gone
        return True


@dataclass
class Findings:
    """What the whole thing came to."""

    rows: list[ZooRow]
    runs: list[Run]
    interrupted: list[set[str]]
    reused: dict[str, int]
    units: dict[str, int]
    checked: int
    alone_s: float


def survive(folder: Path, kills: Sequence[int]) -> Findings:
    """Run, kill, resume, finish, and hold what came out against what was promised."""
    runs, interrupted, before = [], [], dict[str, ZooRow]()
    with cluster() as nodes:
        zoo = Zoo(folder, nodes.gcs_address)
        for number, count in enumerate([*kills, None]):
            last = number == len(kills) - 1
            lose = (lambda: nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)) if last else None
            run = zoo.live(until_rows=count, lose=lose)
            _hold(run.skipped == set(before), f"skipped {run.skipped ^ set(before)} wrongly")
            now = zoo.finished()
            _hold(all(now.get(name) == row for name, row in before.items()), "a row changed after its job was finished")
            started = {job.spec.name for request, job in zoo.requests.items() if _begun(zoo, request)}
            if run.killed:
                interrupted.append(started - set(now))
            runs.append(run)
            print(
                f"life {number + 1}: {run.seconds:.0f} s, {len(run.skipped)} skipped, {len(now) - len(before)} finished"
                + (f", {len(interrupted[-1])} interrupted by SIGKILL" if run.killed else ""),
                flush=True,
            )
            before = now
        rows = zoo.rows()
    _hold([row.name for row in rows] == [job.spec.name for job in zoo.jobs], "the table is not one row for each job")
    _hold(all(row.status == "done" for row in rows), f"not done: {[row.name for row in rows if row.status != 'done']}")
    _hold({row.name: row for row in rows} == before, "the table is not what the ledger holds")
    reports = {row.name: _report(zoo, row) for row in rows}
    begin = time.monotonic()
    for job, row in zip(zoo.jobs, rows, strict=True):
        alone = _alone(job, folder / "alone")
        _hold(alone == row.digest, f"{row.name}: digest {row.digest}, {alone} when run alone")
    return Findings(
        rows,
        runs,
        interrupted,
        {name: report.work.reused for name, report in reports.items()},
        {name: report.work.units for name, report in reports.items()},
        len(rows),
        time.monotonic() - begin,
    )


def _begun(zoo: Zoo, request: str) -> bool:
    return zoo.ledger.store.exists(f"{zoo.ledger.prefix}/jobs/{request.removeprefix('sha256:')}/0001.started.json")


def _report(zoo: Zoo, row: ZooRow) -> JobResult:
    assert row.version is not None
    return JobResult.model_validate_json(Registry(zoo.ledger.store).get_report(row.name, row.version, "job"))


def _alone(job: ZooJob, folder: Path) -> str:
    """Run one job in this process, in a store of its own, without measuring it."""
    store = job.spec.store.model_copy(update={"uri": str(folder / job.spec.name)})
    spec = job.spec.model_copy(update={"store": store, "evaluate": None})
    digest = run_job(spec, InProcessExecutor()).digest
    shutil.rmtree(folder)
    return digest


def _hold(kept: bool, broken: str) -> None:
    if not kept:
        raise Broken(broken)


def told(found: Findings, kills: Sequence[int]) -> str:
    """Return the findings in a few lines."""
    cut = sorted({name for names in found.interrupted for name in names})
    reused, units = (sum(counts[name] for name in cut) for counts in (found.reused, found.units))
    lives = "; ".join(
        f"life {number}: {run.seconds:.0f} s, {len(run.skipped)} skipped" for number, run in enumerate(found.runs, 1)
    )
    return (
        f"{len(found.rows)} jobs, {len({(row.library, row.model) for row in found.rows})} architectures, "
        f"{sum(row.weights or 0 for row in found.rows) / 1e6:.1f} M weights, {sum(found.units.values()):,} units. "
        f"The driver was killed at {' and '.join(map(str, kills))} rows, a node removed before the last kill. "
        f"{lives}. {len(cut)} jobs were at work at a kill; {reused:,} of their {units:,} units were found done. "
        f"All {found.checked} manifests have the digest of the same job alone in one process "
        f"({found.alone_s:.0f} s for all of them). Load average at the end: {os.getloadavg()[1]:.1f}."
    )


def markdown(found: Findings, kills: Sequence[int]) -> str:
    """Return the table for people."""
    lines = [
        "# A zoo that was killed twice",
        "",
        "Written by `make zoo-survival`. The six models with real weights are the CIFAR ones, FD-MobileNet, MENet and",
        "SqueezeNet 1.1; the others have random ones, so that only their sizes tell. Top-1 on the first 300 CIFAR-10",
        "test images, ranges from 64 training images; `a8`: 8-bit activations.",
        "",
        told(found, kills),
        "",
        "| model | recipe | weights, M | float | full-bit | part-bit | float, MB | base, MB | high, MB | low, MB "
        "| bits/weight | attempts | units, reused | s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found.rows:
        full = row.top1_full if row.top1_full_activations is None else row.top1_full_activations
        part = row.top1_part if row.top1_part_activations is None else row.top1_part_activations
        cells = [
            f"{row.library}/{row.model}",
            row.recipe,
            f"{(row.weights or 0) / 1e6:.2f}",
            *("" if value is None else f"{value:.1f}" for value in (row.top1_float, full, part)),
            *(f"{(size or 0) / 1e6:.2f}" for size in (row.float_bytes, row.base_bytes, row.high_bytes, row.low_bytes)),
            f"{row.bits_per_weight or 0:.2f}",
            str(row.attempts),
            f"{found.units[row.name]}, {found.reused[row.name]}",
            f"{row.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run it; 0 where every promise held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill-at", type=int, nargs="+", default=[7, 15], help="rows at which the driver is killed")
    parser.add_argument("--folder", type=Path, help="where everything goes; a temporary folder by default")
    parser.add_argument("--write", action="store_true", help="write docs/results/zoo.md and zoo.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nestquant-zoo-") as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = survive(folder, arguments.kill_at)
        except Broken as error:
            print(f"broken: {error}", file=sys.stderr)
            return 1
        command = [sys.executable, "-m", "jobs.cli.main", "zoo", "report", str(folder / "results")]
        subprocess.run([*command, "--html", str(folder / "zoo.html")], check=True)
        print(told(found, arguments.kill_at))
        if arguments.write:
            (ROOT / "docs" / "results" / "zoo.md").write_text(markdown(found, arguments.kill_at))
            shutil.copy(folder / "results" / "results.csv", ROOT / "docs" / "results" / "zoo.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
