"""A time-out for one task, kept in the worker itself, so that waiting in a queue does not count."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

KILL_FACTOR = 2
"""A task that is still stuck in compiled code after so many times its time-out is ended with its process."""


class TaskTimeout(Exception):
    """The task ran longer than it may."""


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise `TaskTimeout` where the block runs longer than ``seconds``; None waits for ever.

    The exception is raised between two bytecodes of the main thread. Compiled code that never comes back is no
    reason to wait for ever: after ``KILL_FACTOR`` times as long every thread's stack goes to standard error, and the
    process ends, which the cluster sees as a lost worker.
    """
    if seconds is None:
        yield
        return

    def expire(_: int, frame: FrameType | None) -> None:
        where = "" if frame is None else f", in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        raise TaskTimeout(f"no result after {seconds:g} s{where}; cluster.task_timeout_s sets how long a task may take")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(KILL_FACTOR * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
