"""What a running job tells whoever listens: a terminal, a log, or nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal[
    "validate",
    "stage",
    "plan",
    "trace",
    "sensitivity",
    "synthesize",
    "equalize",
    "calibrate",
    "reconstruct",
    "quantize",
    "export",
    "publish",
    "pull",
    "evaluate",
]


@dataclass(frozen=True)
class Event:
    """``started`` and ``finished`` frame a stage; ``progress`` counts ``done`` of ``total``; ``note`` is a line for
    people.
    """

    kind: Literal["started", "progress", "finished", "note"]
    stage: Stage
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    message: str = ""


Listener = Callable[[Event], None]


@dataclass
class StageClock:
    """Times the stages of one job and tells the listener of each."""

    listen: Listener
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time a stage; what fails inside is not reported as finished."""
        self.listen(Event("started", name))
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        self.listen(Event("finished", name, seconds=self.seconds[name]))

    def progress(self, name: Stage) -> Callable[[int, int], None]:
        """Return a function that tells the listener how far a stage is: ``done`` of ``total``."""
        return lambda count, total: self.listen(Event("progress", name, done=count, total=total))
