"""What a zoo has finished: create-only records in the store, and tables made of them.

    zoo/<zoo>/jobs/<request>/0001.started.json    an attempt began
    zoo/<zoo>/jobs/<request>/0001.row.json        and ended, well or badly
    zoo/<zoo>/results.{jsonl,csv,parquet}         everything so far, written anew from the rows

An attempt without a row was killed. Rows are found by request, never by LIST. Nothing is appended to a file that
a kill could tear: tables are replaced whole.
"""

from __future__ import annotations

import csv
import io
import os
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from jobs.zoo.row import STAGES, ZooRow
from storage.errors import AlreadyExists, NotFound
from storage.manifest import canonical_json
from storage.stores.blob_store import BlobStore
from workers.errors import WorkError

ROWS = "results.jsonl"
_LOOKUPS = 16
_MAX_ROW_BYTES = 16 << 20


class ZooLedger:
    """The records of one zoo in one store; safe to share between threads and processes."""

    def __init__(self, store: BlobStore, zoo: str) -> None:
        self.store = store
        self.prefix = f"zoo/{zoo}"

    def _key(self, request: str, attempt: int, what: str) -> str:
        return f"{self.prefix}/jobs/{request.removeprefix('sha256:')}/{attempt:04d}.{what}.json"

    def begin(self, request: str) -> int:
        """Record that a request is being worked on and return the number of the attempt, from 1."""
        record = canonical_json({"host": socket.gethostname(), "pid": os.getpid(), "unix_s": int(time.time())})
        attempt = 1
        while True:
            key = self._key(request, attempt, "started")
            try:
                if not self.store.exists(key):
                    self.store.put(key, record, mode="create")
                    return attempt
            except AlreadyExists:
                pass
            attempt += 1

    def end(self, row: ZooRow) -> None:
        """Keep an attempt's row."""
        self.store.put(self._key(row.request, row.attempts, "row"), canonical_json(row), mode="create")

    def finished(self, request: str) -> ZooRow | None:
        """Return the row of the attempt that was published, if there is one."""
        attempt = 1
        while self.store.exists(self._key(request, attempt, "started")):
            row = self._row(request, attempt)
            if row is not None and row.status != "failed":
                return row
            attempt += 1
        return None

    def finished_of(self, requests: Iterable[str]) -> dict[str, ZooRow]:
        """Return the rows of those requests that are finished."""
        with ThreadPoolExecutor(_LOOKUPS) as pool:
            return {row.request: row for row in pool.map(self.finished, requests) if row is not None}

    def _row(self, request: str, attempt: int) -> ZooRow | None:
        key = self._key(request, attempt, "row")
        try:
            return ZooRow.model_validate_json(self.store.get(key, max_bytes=_MAX_ROW_BYTES))
        except NotFound:
            return None
        except ValidationError as error:
            raise WorkError(
                f"The zoo's record {key} is damaged ({error.error_count()} faults); delete it, and the job runs again."
            ) from error

    def write_tables(self, rows: Sequence[ZooRow]) -> None:
        """Replace the tables in the store."""
        for name, data in tables(rows).items():
            self.store.put(f"{self.prefix}/{name}", data, mode="overwrite")

    def read_rows(self) -> list[ZooRow]:
        """Return the rows as last written to the store."""
        return parse_rows(self.store.get(f"{self.prefix}/{ROWS}"))


def tables(rows: Sequence[ZooRow]) -> dict[str, bytes]:
    """Return file name -> bytes: ``results.jsonl`` with everything, CSV and Parquet with plain columns."""
    cells = [row.cells() for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(cells, schema=SCHEMA), sink, compression="zstd")
    return {
        ROWS: b"".join(canonical_json(row) + b"\n" for row in rows),
        "results.csv": text.getvalue().encode(),
        "results.parquet": sink.getvalue().to_pybytes(),
    }


def write_files(rows: Sequence[ZooRow], folder: Path) -> None:
    """Replace the tables in a folder, each at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tables(rows).items():
        part = folder / f".{name}.part"
        part.write_bytes(data)
        part.replace(folder / name)


def parse_rows(data: bytes) -> list[ZooRow]:
    """Return the rows of a ``results.jsonl``.

    Raises:
        WorkError: it is none; the message names the line.
    """
    rows = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            rows.append(ZooRow.model_validate_json(line))
        except ValidationError as error:
            raise WorkError(f"{ROWS}, line {number}: not a row of results ({error.error_count()} faults).") from error
    return rows


def _schema() -> pa.Schema:
    """Parquet columns have the types of the row's fields, whatever values there are; integers are 64 bits wide."""
    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}

    def column(annotation: Any) -> Any:
        return next((types[kind] for kind in (annotation, *get_args(annotation)) if kind in types), pa.string())

    left_out = {"layers", "traceback", "seconds_by_stage", "tool_versions"}
    fields = [
        pa.field(name, column(field.annotation)) for name, field in ZooRow.model_fields.items() if name not in left_out
    ]
    fields += [pa.field(f"seconds_{stage}", pa.float64()) for stage in STAGES]
    return pa.schema([*fields, pa.field("tool_versions", pa.string())])


SCHEMA = _schema()
