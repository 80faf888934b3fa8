"""Jobs that are killed leave their temporary folder, weights in it; the next start removes it, but no living one's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT

Document = Callable[..., dict[str, Any]]


class Jobs:
    """Runs ``nestquant quantize`` on one spec, with a temporary folder of its own."""

    def __init__(self, spec: Path, place: Path) -> None:
        self.argv = [sys.executable, "-m", "jobs.cli.main", "quantize", str(spec), "--local"]
        self.environment = {**os.environ, "TMPDIR": str(place)}
        self.place = place

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            self.argv, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def until(self, process: subprocess.Popen[str], pattern: str) -> None:
        """Wait until the process has made a file of this pattern in its temporary folder."""
        before = set(self.place.glob(pattern))
        deadline = time.monotonic() + 120
        while set(self.place.glob(pattern)) <= before:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def run(self) -> str:
        """Run a job to its end and return what it told on the way."""
        done = subprocess.run(self.argv, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr


@pytest.fixture
def jobs(tiny_document: Document, tiny_checkpoint: Path, tmp_path: Path) -> Jobs:
    """A job whose checkpoint is a pickle, so that its temporary folder holds a copy of all weights."""
    torch.save(load_file(tiny_checkpoint), tmp_path / "mine.pth")
    (tmp_path / "spec.json").write_text(json.dumps(tiny_document(model__checkpoint=str(tmp_path / "mine.pth"))))
    (tmp_path / "tmp").mkdir()
    return Jobs(tmp_path / "spec.json", tmp_path / "tmp")


def test_what_killed_jobs_left_is_removed_by_the_next(jobs: Jobs) -> None:
    # Killed while weights are converted, while it calibrates, and while it measures what it pulled.
    patterns = ["nestquant-job-*", "nestquant-job-*/checkpoint.safetensors", "nestquant-measure-*/nestquant-scratch"]
    for pattern in patterns:
        with jobs.started() as process:
            jobs.until(process, pattern)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert [path.name for path in jobs.place.iterdir()] != []
    left = [path for path in jobs.place.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in left)
    folders = len(list(jobs.place.iterdir()))
    assert size > 1_000_000  # a copy of the weights is 1.5 MB
    told = jobs.run()
    assert f"Removed {folders} folders that killed jobs left in {jobs.place}: {size / 1e6:.1f} MB freed." in re.sub(
        r"\s+", " ", told
    )
    assert list(jobs.place.iterdir()) == []


def test_a_job_that_lives_keeps_its_folder_however_long_it_sleeps(jobs: Jobs) -> None:
    with jobs.started() as process:
        jobs.until(process, "nestquant-job-*/checkpoint.safetensors")
        os.kill(process.pid, signal.SIGSTOP)
        held = sorted(str(path) for path in jobs.place.rglob("*"))
        assert "Removed" not in jobs.run()
        assert sorted(str(path) for path in jobs.place.rglob("*")) == held
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait() == 0
    assert list(jobs.place.iterdir()) == []
