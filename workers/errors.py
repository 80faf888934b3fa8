"""Errors of the work itself.

Every message is one line: what was seen, what was expected, what to try.

WorkError
├── ModelError       the architecture cannot be built, or the network does not run
├── CheckpointError  the weights do not fit the architecture, or cannot be read
├── DataError        images or labels cannot be read
├── ArtifactError    a pulled version does not fit together
├── ScratchError     the temporary folder is not there, or cannot be written
│   └── ScratchFull  there is no room left in it
├── NoCluster        no Ray cluster answers where the spec says that there is one
├── WorkerLost       a task's process or machine went away once too often
├── DoesNotFit       no machine is large enough for one task
└── Stopped          the work was cancelled
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage import wording
from storage.wording import bounded

one_line, printable, system_line = wording.one_line, wording.in_one_line, wording.system_text


class WorkError(Exception):
    """Root of everything that goes wrong in the work on a model."""

    def __str__(self) -> str:
        return bounded(super().__str__())


class ModelError(WorkError):
    """The architecture cannot be built, or the network does not run on the inputs that it is given."""


class CheckpointError(WorkError):
    """The weights do not fit the architecture, or cannot be read."""


class DataError(WorkError):
    """Images or labels cannot be read."""


class ArtifactError(WorkError):
    """A pulled version does not fit together."""


class ScratchError(WorkError):
    """The temporary folder is not there, or cannot be written."""

    @staticmethod
    def of(place: Path, error: OSError) -> ScratchError:
        """Return what an error of the operating system in the temporary folder ``place`` comes to."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ScratchFull(f"No room in the temporary folder {place}; free some, or set TMPDIR to a larger one.")
        line = system_line(error)
        return ScratchError(f"The temporary folder {place}: {line}; set TMPDIR to a folder that can be written.")


class ScratchFull(ScratchError):
    """There is no room left in the temporary folder."""


class NoCluster(WorkError):
    """No Ray cluster answers at the address that the spec gives."""


class WorkerLost(WorkError):
    """The process or machine of a task went away more often than the task may be tried again."""


class Stopped(WorkError):
    """The work was cancelled; what was finished before stands in the ledger."""

    def __init__(self) -> None:
        super().__init__("Cancelled. What was finished is kept; the same command goes on from there.")

    def __reduce__(self) -> tuple[type[Stopped], tuple[()]]:
        return type(self), ()


@dataclass(frozen=True)
class Need:
    """The memory that the largest task of a stage needs, in bytes, and the key of the spec that makes it smaller."""

    stage: str
    memory_bytes: int
    smaller: str


class DoesNotFit(WorkError):
    """No machine of the cluster is large enough for one task.

    ``need`` says whose task it is, and which keys of the spec make it smaller.
    """

    def __init__(self, need: Need, *, cpus: float, largest: str) -> None:
        super().__init__(
            f"A task of the stage '{need.stage}' needs {need.memory_bytes / 1e9:.1f} GB and {cpus:g} CPUs; {largest}. "
            f"Make tasks smaller ({need.smaller}, cluster.cpus_per_task) or the machines larger."
        )


def nearest(word: str, candidates: Iterable[str], *, count: int = 3) -> str:
    """Return `` Did you mean 'a', 'b'?`` for the candidates that look most like ``word``, or the empty string."""
    close = difflib.get_close_matches(word, list(candidates), n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def shown(names: Sequence[str], *, most: int = 6) -> str:
    """Return the names as a list for one line of text, the rest counted."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + rest
