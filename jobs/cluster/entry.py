"""What runs on the cluster: ``python -m jobs.cluster.entry STORE REQUEST ATTEMPT``, a driver, as entrypoint.

It reads its spec from the store, reports there how far it is, and leaves there how it ended. Its log is one JSON object
a line, each with job and model.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from dataclasses import asdict
from types import FrameType
from typing import Any

from jobs.cluster.record import End, JobRecord
from jobs.driver import run_job
from jobs.errors import JobError
from jobs.events import Event
from jobs.executors import open_executor
from jobs.spec.job import JobSpec
from storage.errors import StorageError
from storage.stores.uri import open_store
from workers.errors import WorkError

_BEAT_S = 10.0


class _Reporter:
    """Writes each event as a log line, and the latest to the record every few seconds."""

    def __init__(self, record: JobRecord, number: int, spec: JobSpec) -> None:
        self.record, self.number = record, number
        self.common = {"job": record.request, "attempt": number, "name": spec.name, "model": spec.model.arch}
        self.lines: list[str] = []
        self.output = sys.stdout  # of now: an executor turns what others print to standard error
        self._beaten_s = -_BEAT_S

    def listen(self, event: Event) -> None:
        self.write(**{key: value for key, value in asdict(event).items() if value})
        if time.monotonic() - self._beaten_s >= _BEAT_S:
            self.record.beat(self.number, event.stage, event.done, event.total)
            self._beaten_s = time.monotonic()

    def write(self, **fields: Any) -> None:
        line = json.dumps({"unix_s": round(time.time(), 3), **self.common, **fields}, sort_keys=True)
        self.lines.append(line)
        print(line, file=self.output, flush=True)

    def end(self, end: End) -> None:
        self.record.put_log(self.number, "\n".join(self.lines) + "\n")
        self.record.finish(self.number, end)


def main() -> int:
    """Run one attempt of a submitted job; the exit code is what Ray shows as its status."""
    uri, request, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    signal.signal(signal.SIGTERM, _interrupt)
    record = JobRecord(open_store(uri), request)
    spec = record.spec()
    reporter = _Reporter(record, number, spec)
    cluster = spec.cluster.model_copy(update={"address": "auto"})
    try:
        with open_executor(cluster, local=False, json_logs=True) as ray_executor:
            result = run_job(spec, ray_executor, reporter.listen)
    except KeyboardInterrupt:
        reporter.write(kind="stopped")
        reporter.end(End(status="STOPPED", error="cancelled", unix_s=int(time.time())))
        return 130
    except Exception as error:  # whatever it was, the record outlives this process
        message = " ".join(str(error).split()) or type(error).__name__
        reporter.write(kind="failed", message=message)
        story = "".join(traceback.format_exception(error))
        reporter.end(End(status="FAILED", error=message, traceback=story, unix_s=int(time.time())))
        if not isinstance(error, JobError | WorkError | StorageError):  # those are told by their line alone
            print(story, file=sys.stderr)
        return 1
    reporter.write(kind="succeeded", version=result.version, digest=result.digest)
    reporter.end(End(status="SUCCEEDED", error=result.gate, result=result, unix_s=int(time.time())))
    return 0


def _interrupt(_: int, __: FrameType | None) -> None:
    """Ray stops a job with SIGTERM and kills it three seconds later."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
