"""A zoo from spec to tables: rows, failures as rows, resume after a kill, one result whatever runs beside it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cluster.request import request_digest
from jobs.spec.file import parse_spec
from jobs.spec.job import JobSpec
from jobs.spec.zoo import load_zoo
from jobs.zoo.ledger import ZooLedger, parse_rows
from jobs.zoo.row import ZooRow
from jobs.zoo.run import ZooEvent, run_zoo
from storage.registry import Registry
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from workers.executor import InProcessExecutor

TINY = {"in_chans": 1, "num_classes": 10, "img_size": 32}


def _images(path: Path, count: int) -> str:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (count, 32, 32, 1), dtype=np.uint8)
    np.savez(path, x=x, y=generator.integers(0, 10, count))
    return str(path)


def _zoo(folder: Path, **keys: Any) -> Path:
    document = {
        "name": "tiny",
        "store": {"uri": str(folder / "store")},
        "models": [{"models": "timm/test_vit", "kwargs": TINY}, {"models": "timm/test_vit2", "kwargs": TINY}],
        "random_seed": 0,
        "preprocess": {"size": 32, "mean": [0.5], "std": [0.5]},
        "recipes": {"w8-4": {"recipe": "paper", "bits": [8, 4]}},
        **keys,
    }
    path = folder / "zoo.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _run(path: Path, results: Path, *, max_models: int = 1) -> tuple[list[ZooRow], list[ZooEvent]]:
    spec, jobs = load_zoo(path, changes={"max_models": max_models})
    events: list[ZooEvent] = []
    rows = run_zoo(spec, jobs, InProcessExecutor(), results=results, listen=events.append)
    return rows, events


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ZooRow], list[ZooEvent]]:
    """One run of two models, measured on twelve images, and one that fails."""
    folder = tmp_path_factory.mktemp("zoo")
    path = _zoo(
        folder,
        models=[
            {"models": "timm/test_vit", "kwargs": TINY},
            {"models": "timm/test_vit2", "kwargs": TINY, "priority": 1},
            {"models": "timm/test_vit3", "checkpoint": "/nowhere.safetensors"},
        ],
        evaluate={"data": _images(folder / "val.npz", 12)},
    )
    rows, events = _run(path, folder / "results")
    return folder, rows, events


def test_rows_say_what_was_published(measured: tuple[Path, list[ZooRow], list[ZooEvent]]) -> None:
    folder, rows, _ = measured
    assert [(row.name, row.status, row.attempts) for row in rows] == [
        ("timm.test_vit2.w8-4", "done", 1),
        ("timm.test_vit.w8-4", "done", 1),
        ("timm.test_vit3.w8-4", "failed", 1),
    ]
    registry = Registry(open_store(str(folder / "store")))
    for row in rows[:2]:
        resolved = registry.resolve(row.name)
        sizes = resolved.manifest.sizes
        assert (row.version, row.digest) == (resolved.version, resolved.digest)
        assert (row.high_bytes, row.low_bytes) == sizes.level_bytes
        assert (row.float_bytes, row.base_bytes, row.weights) == (sizes.float_bytes, sizes.base_bytes, sizes.weights)
        assert row.bits_per_weight == 8 * sum(sizes.level_bytes) / sizes.weights
        assert row.images == 12
        assert None not in (row.top1_float, row.top1_float_err, row.top1_full, row.top1_part)
        assert row.top1_full_activations is None
        assert [layer.name for layer in row.layers] == [layer.name for layer in resolved.manifest.layers]
        assert row.revision.startswith("timm ")
        assert row.revision.endswith(" random_seed 0")


def test_a_failure_is_a_row_with_its_error_and_traceback(measured: tuple[Path, list[ZooRow], list[ZooEvent]]) -> None:
    _, rows, _ = measured
    failed = rows[2]
    assert failed.error == "No file at /nowhere.safetensors: expected a local path or an s3:// URI."
    assert failed.traceback is not None
    assert "CheckpointError" in failed.traceback
    assert (failed.version, failed.top1_full, failed.revision) == (None, None, "unknown (CheckpointError)")


def test_csv_and_parquet_hold_the_rows(measured: tuple[Path, list[ZooRow], list[ZooEvent]]) -> None:
    folder, rows, _ = measured
    results = folder / "results"
    table = pq.read_table(results / "results.parquet")
    assert table.to_pylist() == [row.cells() for row in rows]
    assert str(table.schema.field("high_bytes").type) == "int64"
    assert str(table.schema.field("top1_full_activations").type) == "double"
    with (results / "results.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["model"] for line in lines] == ["test_vit2", "test_vit", "test_vit3"]
    assert [line["digest"] for line in lines] == [rows[0].digest, rows[1].digest, ""]
    assert parse_rows((results / "results.jsonl").read_bytes()) == rows
    stored = ZooLedger(open_store(str(folder / "store")), "tiny")
    assert stored.read_rows() == rows
    assert sorted(path.name for path in results.iterdir()) == ["results.csv", "results.jsonl", "results.parquet"]


def test_events_frame_every_job(measured: tuple[Path, list[ZooRow], list[ZooEvent]]) -> None:
    _, rows, events = measured
    for row in rows:
        mine = [event for event in events if event.job.spec.name == row.name]
        assert (mine[0].kind, mine[-1].kind, mine[-1].row) == ("started", "ended", row)
    stages = [event.event.stage for event in events if event.event is not None and event.event.kind == "finished"]
    assert stages.count("evaluate") == 2


def test_a_second_run_skips_what_is_done_and_tries_again_what_failed(
    measured: tuple[Path, list[ZooRow], list[ZooEvent]], tmp_path: Path
) -> None:
    folder, rows, _ = measured
    again, events = _run(folder / "zoo.yaml", tmp_path)
    assert again[:2] == rows[:2]
    assert (again[2].status, again[2].attempts) == ("failed", 2)
    assert [event.kind for event in events if event.row is not None] == ["skipped", "skipped", "ended"]


def test_models_side_by_side_give_the_bytes_of_models_in_a_row(
    measured: tuple[Path, list[ZooRow], list[ZooEvent]], tmp_path: Path
) -> None:
    _, rows, _ = measured
    path = _zoo(tmp_path)
    beside, _ = _run(path, tmp_path / "results", max_models=2)
    assert {row.name: row.digest for row in beside} == {row.name: row.digest for row in rows[:2]}


def test_an_attempt_that_was_killed_counts_and_its_job_runs_again() -> None:
    ledger = ZooLedger(MemoryStore(), "z")
    request = f"sha256:{'a' * 64}"
    assert ledger.begin(request) == 1  # and no row: killed
    assert ledger.finished(request) is None
    assert ledger.begin(request) == 2
    row = ZooRow(
        model="m",
        library="timm",
        revision="r",
        recipe="w",
        status="failed",
        error="boom",
        name="n",
        request=request,
        seconds=1.0,
        attempts=2,
        tool_versions={},
    )
    ledger.end(row)
    assert ledger.finished(request) is None
    assert ledger.begin(request) == 3
    done = row.model_copy(update={"status": "done", "error": None, "attempts": 3})
    ledger.end(done)
    assert ledger.finished_of([request, f"sha256:{'b' * 64}"]) == {request: done}


def _spec(**model: Any) -> JobSpec:
    document = {"name": "n", "model": {"library": "timm", "arch": "test_vit", **model}, "store": {"uri": "memory://z"}}
    return parse_spec(document, where="test")


def test_a_request_is_what_is_asked_of_which_bytes_not_where_it_runs(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    asked = request_digest(_spec(checkpoint=str(first)))
    assert request_digest(_spec(checkpoint=str(second))) == asked
    elsewhere = _spec(checkpoint=str(first)).model_copy(update={"cluster": _spec(random_seed=0).cluster})
    moved = elsewhere.model_copy(
        update={
            "store": elsewhere.store.model_copy(update={"uri": "memory://y"}),
            "cluster": elsewhere.cluster.model_copy(update={"max_retries": 9}),
        }
    )
    assert request_digest(moved) == asked
    second.write_bytes(b"other weights")
    assert request_digest(_spec(checkpoint=str(second))) != asked
    assert request_digest(_spec(random_seed=0)) != request_digest(_spec(random_seed=1))


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Kill -9 in the second job: the tables are whole, and the next run does the rest alone."""
    path, results = _zoo(tmp_path), tmp_path / "results"
    command = [sys.executable, "-m", "jobs.cli.main", "zoo", str(path), "--local", "--json", "--results", str(results)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        done = next(event for line in first.stdout if (event := json.loads(line))["event"] == "ended")
        started = next(event for line in first.stdout if (event := json.loads(line))["event"] == "started")
        os.kill(first.pid, signal.SIGKILL)
    file = results / "results.jsonl"
    assert [row.name for row in parse_rows(file.read_bytes() if file.exists() else b"")] in ([], [done["name"]])

    rows, events = _run(path, results)
    ended = [(event.kind, event.row.name, event.row.attempts) for event in events if event.row is not None]
    assert ended == [("skipped", done["name"], 1), ("ended", started["name"], 2)]
    assert [row.status for row in rows] == ["done", "done"]
    assert parse_rows(file.read_bytes()) == rows
