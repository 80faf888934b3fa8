"""What the recipe ``calibrated`` costs: ``python -m tests.benchmarks.bench_calibrated [MODEL ...] [--samples N ...]``.

A job without evaluation for each model of the test data and number of calibration images, each in a process of its own
on one thread: seconds of the stage ``reconstruct``, CPU seconds of the whole process, peak resident memory beside what
the job asks for (``jobs.stages.memory``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.accuracy_table import MODELS

DEFAULT_SAMPLES = (128, 256, 512)


def main() -> None:
    """Print a line for each job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--samples", type=int, action="append", help=f"default: {DEFAULT_SAMPLES}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    samples = arguments.samples or list(DEFAULT_SAMPLES)
    if arguments.child:
        print(json.dumps(measured(arguments.child, samples[0])))
        return
    print("model, images: reconstruct s, all CPU s, peak MB, asked MB (load average)")
    for known in MODELS:
        if known.limit is not None or (arguments.models and known.name not in arguments.models):
            continue
        for count in samples:
            command = [sys.executable, "-m", "tests.benchmarks.bench_calibrated", "--child", known.name]
            ended = subprocess.run([*command, "--samples", str(count)], capture_output=True, text=True, check=True)
            row = json.loads(ended.stdout.splitlines()[-1])
            print(
                f"{known.name}, {count}: {row['reconstruct']:.1f} s, {row['cpu']:.1f} s, {row['peak'] / 1e6:.0f} MB, "
                f"{row['asked'] / 1e6:.0f} MB ({os.getloadavg()[0]:.1f})",
                flush=True,
            )


def measured(name: str, samples: int) -> dict[str, float]:
    """Run one job here."""
    import torch

    from jobs.driver import run_job
    from jobs.events import StageClock
    from jobs.stages.preparation import prepare
    from workers.executor import InProcessExecutor

    torch.set_num_threads(1)
    known = next(known for known in MODELS if known.name == name)
    with tempfile.TemporaryDirectory(prefix="nestquant-cost-") as folder:
        spec = known.spec((8, 4), Path(folder) / "store", recipe="calibrated", samples=samples)
        prepared = prepare(spec, InProcessExecutor(), Path(folder), StageClock(lambda _: None))
        begin = time.process_time()
        result = run_job(spec, InProcessExecutor())
        return {
            "reconstruct": result.seconds["reconstruct"],
            "cpu": time.process_time() - begin,
            # ru_maxrss survives exec: it would be the parent's where that was larger.
            "peak": 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]),
            "asked": prepared.needs["reconstruct"].memory_bytes,
        }


if __name__ == "__main__":
    main()
