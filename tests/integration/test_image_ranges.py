"""A version measured by ranges of images: the counts of one run over all, on a real Ray, with workers that are lost."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.driver import run_job
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from jobs.stages import evaluation
from storage.stores.uri import open_store
from workers.errors import DataError
from workers.evaluate import Counts
from workers.executor import Executor, InProcessExecutor
from workers.measure import MeasuredRange, MeasureTask, measure
from workers.on_ray.executor import RayExecutor, RaySettings

Document = Callable[..., dict[str, Any]]
A = TypeVar("A")
R = TypeVar("R")
BATCH = 3
IMAGES = 40


class Watching(InProcessExecutor):
    """Keeps the tasks of the evaluation, and ends where it is told to, as a driver that is killed."""

    def __init__(self, *, ends_after: int | None = None) -> None:
        super().__init__()
        self.tasks: list[MeasureTask] = []
        self.ends_after = ends_after

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        measured = 0
        for index, result in super().map(function, items, memory_bytes=memory_bytes):
            if isinstance(item := items[index], MeasureTask):
                self.tasks.append(item)
                measured += 1
            yield index, result
            if measured == self.ends_after:
                raise KeyboardInterrupt


def run(document: dict[str, Any], executor: Executor | None = None) -> JobResult:
    return run_job(parse_spec(document, where="test"), executor or InProcessExecutor())


def comparable(result: JobResult) -> list[dict[str, Any]]:
    """Return the modes without their seconds."""
    return [one.model_dump(exclude={"seconds"}) for one in result.measured]


def records(document: dict[str, Any]) -> dict[str, bytes]:
    """Return the ledger's records of measured ranges."""
    store = open_store(document["store"]["uri"])
    return {info.key: store.get(info.key) for info in store.list("jobs/") if "/measured/" in info.key}


@pytest.fixture
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven images of 32 pixels a range, made whole batches of three: nine."""
    monkeypatch.setattr(evaluation, "RANGE_IMAGES", 7)


def test_a_job_on_ray_reports_the_same_in_many_ranges_as_in_one(
    tiny_document: Document, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(tiny_document(evaluate__batch_size=BATCH, evaluate__limit=37))
    monkeypatch.setattr(evaluation, "RANGE_IMAGES", 7)
    document = tiny_document(evaluate__batch_size=BATCH, evaluate__limit=37, store__uri=str(tmp_path / "ray"))
    with RayExecutor(RaySettings()) as executor:
        many = run(document, executor)
    assert many.digest == one.digest
    assert comparable(many) == comparable(one)
    assert {mode.total for mode in many.measured} == {37}
    assert len(records(document)) == 5 * 5  # five modes, ranges of nine and one of one
    assert many.model_dump().keys() == one.model_dump().keys()


@pytest.fixture(scope="module")
def tasks(
    tiny_checkpoint: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[MeasureTask, MeasuredRange]]:
    """One task over all the images for each mode of a published version, and what it measured here."""
    from tests import tiny

    store = tmp_path_factory.mktemp("ranges") / "store"
    document = tiny.job_document(checkpoint=str(tiny_checkpoint), images=str(tiny_images), store=str(store))
    document["evaluate"]["batch_size"] = BATCH
    executor = Watching()
    run(document, executor)
    # Without the driver's folder, which is gone, and without a record that would be found.
    whole = [task.model_copy(update={"cache": None, "series": None}) for task in executor.tasks]
    assert [(task.start, task.stop) for task in whole] == [(0, IMAGES)] * 5
    return [(task, measure(task)) for task in whole]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges=st.sets(st.integers(1, IMAGES // BATCH), min_size=1), mode=st.integers(0, 4))
def test_any_ranges_of_whole_batches_add_up_on_ray_to_one_task(
    tasks: list[tuple[MeasureTask, MeasuredRange]], ray_cluster: None, edges: set[int], mode: int
) -> None:
    whole, expected = tasks[mode]
    cuts = [0, *(edge * BATCH for edge in sorted(edges)), IMAGES]
    parts = [whole.model_copy(update={"start": start, "stop": stop}) for start, stop in itertools.pairwise(cuts)]
    with RayExecutor(RaySettings()) as executor:
        measured = dict(executor.map(measure, parts))
    assert sum((measured[index].counts for index in sorted(measured)), Counts()) == expected.counts
    assert {part.resident_bytes for part in measured.values()} == {expected.resident_bytes}


def test_a_killed_worker_costs_one_range(
    tasks: list[tuple[MeasureTask, MeasuredRange]], ray_cluster: None, tmp_path: Path
) -> None:
    whole, expected = tasks[-1]
    log, store = tmp_path / "log", str(tmp_path / "store")

    def once_killed(task: MeasureTask) -> MeasuredRange:
        """Measure; whoever comes to image 12 first dies of it."""
        with log.open("a") as file:
            file.write(f"{task.start}\n")
        if task.start == 12 and log.read_text().splitlines().count("12") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(task)

    parts = [whole.model_copy(update={"start": start, "stop": min(start + 6, IMAGES)}) for start in range(0, IMAGES, 6)]
    with RayExecutor(RaySettings()) as executor:
        measured = dict(executor.map(once_killed, parts))
    assert sorted(map(int, log.read_text().split())) == [0, 6, 12, 12, 18, 24, 30, 36]
    assert sum((measured[index].counts for index in sorted(measured)), Counts()) == expected.counts
    assert not Path(store).exists()


@pytest.mark.usefixtures("short_ranges")
def test_a_job_that_ended_in_the_middle_measures_what_is_missing_alone(tiny_document: Document) -> None:
    document = tiny_document(evaluate__batch_size=BATCH)
    with pytest.raises(KeyboardInterrupt):
        run(document, Watching(ends_after=7))
    earlier = records(document)
    assert len(earlier) == 7
    store = open_store(document["store"]["uri"])
    # A record that says one right answer more than there was: whoever measured that range again would see it.
    key = next(key for key in earlier if key.endswith("float-00000009-00000018.json"))
    changed = json.loads(earlier[key])
    changed["counts"]["correct"] += 1
    store.put(key, json.dumps(changed).encode(), mode="overwrite")
    resumed = run(document)
    store.put(key, earlier[key], mode="overwrite")
    assert len(records(document)) == 5 * 5
    assert earlier.items() <= records(document).items()
    again = run(document)
    assert [one.correct for one in resumed.measured] == [one.correct + (one.level is None) for one in again.measured]


@pytest.mark.usefixtures("short_ranges")
def test_other_labels_or_other_batches_are_measured_anew(
    tiny_document: Document, tiny_images: Path, tmp_path: Path
) -> None:
    first = run(tiny_document(evaluate__batch_size=BATCH))
    arrays = np.load(tiny_images)
    moved = tmp_path / "moved.npz"
    np.savez(moved, x=arrays["x"], y=(arrays["y"] + 1) % 10)
    document = tiny_document(evaluate__batch_size=BATCH, evaluate__data=str(moved))
    other = run(document)
    assert len(records(document)) == 2 * 5 * 5
    assert other.digest == first.digest
    fresh = run(
        tiny_document(evaluate__batch_size=BATCH, evaluate__data=str(moved), store__uri=str(tmp_path / "fresh"))
    )
    assert comparable(other) == comparable(fresh) != comparable(first)
    run(tiny_document(evaluate__batch_size=BATCH + 1))
    assert len(records(document)) == 2 * 5 * 5 + 5 * 5  # eight a range


@pytest.mark.usefixtures("short_ranges")
def test_chance_is_judged_over_the_whole_set_and_before_the_other_modes(tiny_document: Document) -> None:
    """Nine images are too few for a verdict, forty are enough."""
    document = tiny_document(evaluate__batch_size=BATCH, evaluate__accept_chance=False)
    with pytest.raises(DataError, match=r"the float network is right on \d of 40 images, and chance alone gives"):
        run(document)
    assert {Path(key).name.partition("-")[0] for key in records(document)} == {"float"}
    document["evaluate"]["accept_chance"] = True
    assert len(run(document).measured) == 5
