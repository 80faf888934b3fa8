"""What people and machines see of a zoo: one live table, or a JSON line for each event."""

from __future__ import annotations

import json
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from jobs.cli.tables import Column, WholeTable
from jobs.cli.terminal import PlainConsole
from jobs.spec.zoo import ZooJob
from jobs.zoo.row import ZooRow
from jobs.zoo.run import ZooEvent, ZooListener
from storage.wording import size

_LATEST = 12
_HEADINGS = 9  # lines of the live table that are no rows
_STYLES = {"done": "green", "below gate": "yellow", "failed": "red"}


@contextmanager
def zoo_listener(jobs: Sequence[ZooJob], *, as_json: bool) -> Iterator[ZooListener]:
    """Yield a listener: JSON lines on standard output, a live table on a terminal, else a line for each model."""
    console = PlainConsole(stderr=True)
    if as_json:
        yield _Lines().json
    elif not console.is_terminal:
        yield _Lines(console, len(jobs)).text
    else:
        table = _LiveTable(len(jobs))
        with Live(table, console=console, refresh_per_second=4):
            yield table.listen


class _Lines:
    """One line an event; a lock keeps lines of several threads whole."""

    def __init__(self, console: Console | None = None, total: int = 0) -> None:
        self.console, self.total, self.ended = console, total, 0
        self.output = sys.stdout  # of now: an executor turns what others print to standard error
        self.lock = threading.Lock()

    def json(self, event: ZooEvent) -> None:
        with self.lock:
            print(json.dumps(event_document(event), sort_keys=True), file=self.output, flush=True)

    def text(self, event: ZooEvent) -> None:
        if event.row is None or self.console is None:
            return
        with self.lock:
            self.ended += 1
            state = "finished before" if event.kind == "skipped" else event.row.status
            reason = f": {event.row.error}" if event.row.error else ""
            self.console.print(
                f"[{self.ended}/{self.total}] {event.row.name}: {state}, {event.row.seconds:.1f} s{reason}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def event_document(event: ZooEvent) -> dict[str, Any]:
    """Return an event as JSON values; per-layer figures stay in the ledger."""
    document: dict[str, Any] = {"event": event.kind, "name": event.job.spec.name, "recipe": event.job.recipe}
    if event.event is not None:
        inner = event.event
        document |= {"stage": inner.stage, "what": inner.kind}
        if inner.kind == "progress":
            document |= {"done": inner.done, "total": inner.total}
        elif inner.kind == "finished":
            document["seconds"] = inner.seconds
        elif inner.kind == "note":
            document["message"] = inner.message
    if event.row is not None:
        document["row"] = event.row.cells()
    return document


class _LiveTable:
    """Counts, the jobs at work with their stage, and the latest that ended."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.at_work: dict[str, str] = {}
        self.latest: deque[ZooRow] = deque(maxlen=_LATEST)
        self.counts = dict.fromkeys(("done", "below gate", "failed"), 0)
        self.skipped = 0
        self.lock = threading.Lock()

    def listen(self, event: ZooEvent) -> None:
        name = event.job.spec.name
        with self.lock:
            if event.kind == "started":
                self.at_work[name] = "starts"
            elif event.event is not None and event.event.kind in ("started", "progress"):
                inner = event.event
                self.at_work[name] = f"{inner.stage} {inner.done}/{inner.total}" if inner.total else inner.stage
            elif event.row is not None:
                self.at_work.pop(name, None)
                self.counts[event.row.status] += 1
                self.skipped += event.kind == "skipped"
                self.latest.append(event.row)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self.lock:
            ended = sum(self.counts.values())
            summary = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count) or "none ended"
            head = f"{ended} of {self.total}: {summary}; {self.skipped} from earlier runs, {len(self.at_work)} at work"
            work = WholeTable([Column("at work"), Column("stage")])
            for name, stage in self.at_work.items():
                work.add_row(name, stage)
            # What is taller than the terminal would be cut from below: rows may take two lines each.
            free = (options.height or console.height) - len(self.at_work) - _HEADINGS
            shown = list(self.latest)[-max(1, free // 2) :]
            yield Text(head, style="bold")
            yield work
            yield results_table(shown, title="latest")


def results_table(rows: Sequence[ZooRow], *, title: str) -> WholeTable:
    """Return rows as a table for people.

    Top-1 is that with quantized activations where there are any, ``bits`` what a weight takes at rest.
    """
    words = [Column(name) for name in ("model", "recipe", "status")]
    figures = [Column(name, figures=True) for name in ("float", "full", "part", "bits", "stored", "s")]
    table = WholeTable([*words, *figures], title=title)
    for row in rows:
        full = row.top1_full if row.top1_full_activations is None else row.top1_full_activations
        part = row.top1_part if row.top1_part_activations is None else row.top1_part_activations
        stored = None if row.high_bytes is None else row.high_bytes + (row.low_bytes or 0) + (row.base_bytes or 0)
        table.add_row(
            row.model,
            row.recipe,
            Text(row.status, style=_STYLES[row.status]),
            *(_figure(value) for value in (row.top1_float, full, part, row.bits_per_weight)),
            "" if stored is None else size(stored),
            f"{row.seconds:.1f}",
        )
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
