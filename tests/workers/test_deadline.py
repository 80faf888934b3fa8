"""Time-outs in the worker's own process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from workers.on_ray.deadline import TaskTimeout, deadline


def test_what_takes_too_long_is_interrupted_and_the_alarm_is_put_back() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TaskTimeout, match=r"no result after 0\.1 s, in test_what_takes_too_long"), deadline(0.1):
        time.sleep(20)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_is_done_in_time_is_left_alone() -> None:
    with deadline(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with deadline(None):
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_code_that_never_comes_back_ends_with_its_process() -> None:
    """A blocked signal is what compiled code looks like from outside: the interrupt does not get through."""
    stuck = (
        "import signal, time\n"
        "from workers.on_ray.deadline import deadline\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "with deadline(0.2):\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", stuck], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert 'File "<string>", line 5' in ended.stderr
