"""Run a zoo: many jobs on one cluster, several at a time, what is finished skipped, what failed a row like the rest."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.cluster.request import request_digest
from jobs.driver import run_job
from jobs.events import Event
from jobs.spec.zoo import ZooJob, ZooSpec
from jobs.zoo.ledger import ZooLedger, write_files
from jobs.zoo.row import ZooRow, failed_row, finished_row
from storage.digest import digest_bytes
from storage.errors import StorageError
from storage.stores.uri import open_store
from workers.errors import Stopped, WorkError
from workers.executor import Executor

_TABLES_EVERY_S = 30.0


@dataclass(frozen=True)
class ZooEvent:
    """``started``, ``stage`` (an event of the job itself), ``ended`` (with its row) or ``skipped`` (an earlier row)."""

    kind: Literal["started", "stage", "ended", "skipped"]
    job: ZooJob
    event: Event | None = None
    row: ZooRow | None = None


ZooListener = Callable[[ZooEvent], None]


class _Tables:
    """Everything known so far, in the order of the jobs, in a folder (at once) and in the store (now and then)."""

    def __init__(self, requests: Sequence[str], ledger: ZooLedger, folder: Path) -> None:
        self.order = {request: index for index, request in enumerate(requests)}
        self.ledger, self.folder = ledger, folder
        self.rows: dict[str, ZooRow] = {}
        self._stored_s = time.monotonic()

    def add(self, rows: Sequence[ZooRow]) -> None:
        self.rows |= {row.request: row for row in rows}
        write_files(self.sorted(), self.folder)
        if time.monotonic() - self._stored_s > _TABLES_EVERY_S:
            self.store()

    def store(self) -> None:
        self.ledger.write_tables(self.sorted())
        self._stored_s = time.monotonic()

    def sorted(self) -> list[ZooRow]:
        return sorted(self.rows.values(), key=lambda row: self.order[row.request])


def run_zoo(
    spec: ZooSpec, jobs: Sequence[ZooJob], executor: Executor, *, results: Path, listen: ZooListener
) -> list[ZooRow]:
    """Run what is not finished yet and return a row for every job, in their order.

    ``spec.max_models`` drivers run in threads of this process and share the executor, so that one model's tasks fill
    the CPUs that another leaves idle. A job that fails becomes a row, and the others go on. A killed run is run again:
    finished jobs are skipped by their request's digest, half-finished ones go on from their ledger.

    Args:
        spec: the zoo.
        jobs: its jobs, in the order in which they start.
        executor: does the work.
        results: a folder for the tables, which are complete after each model.
        listen: hears of each job; called from several threads.

    Raises:
        storage.StorageError: the store is out of reach.
        KeyboardInterrupt: after every job at work was cancelled.
    """
    ledger = ZooLedger(open_store(spec.store.uri), spec.name)
    requests = [_request(job) for job in jobs]
    tables = _Tables(requests, ledger, results)
    finished = ledger.finished_of(requests)
    tables.add(list(finished.values()))
    waiting = []
    for job, request in zip(jobs, requests, strict=True):
        if request in finished:
            listen(ZooEvent("skipped", job, row=finished[request]))
        else:
            waiting.append((job, request))
    with ThreadPoolExecutor(spec.max_models, thread_name_prefix="nestquant-zoo") as pool:
        running: set[Future[ZooRow | None]] = {
            pool.submit(_one, job, request, executor, ledger, listen) for job, request in waiting
        }
        try:
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                tables.add([row for future in ended if (row := future.result()) is not None])
        except BaseException:
            executor.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            tables.store()
    return tables.sorted()


def _request(job: ZooJob) -> str:
    """A job whose files are missing has a name of its own, so that it fails as a row and not as the end of the zoo."""
    try:
        return request_digest(job.spec)
    except (WorkError, StorageError):
        later = {"model": {"code"}} if job.spec.model.code is None else None  # a key that earlier releases had not
        return digest_bytes(job.spec.model_dump_json(exclude=later).encode())


def _one(job: ZooJob, request: str, executor: Executor, ledger: ZooLedger, listen: ZooListener) -> ZooRow | None:
    """Run one job and keep its row; None where the zoo was stopped."""
    begin = time.perf_counter()
    attempt = ledger.begin(request)
    listen(ZooEvent("started", job))
    try:
        result = run_job(job.spec, executor, lambda event: listen(ZooEvent("stage", job, event=event)))
        row = finished_row(job, request, result, attempts=attempt, seconds=time.perf_counter() - begin)
    except Stopped:
        return None
    except Exception as error:  # a failure is a row like the others; the exit code tells
        trace = "".join(traceback.format_exception(error))
        row = failed_row(job, request, error, trace, attempts=attempt, seconds=time.perf_counter() - begin)
    ledger.end(row)
    listen(ZooEvent("ended", job, row=row))
    return row
