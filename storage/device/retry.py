"""Trying again: how often, how long to wait, and which errors are worth it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from storage.device.errors import ContentError, GaveUp, SourceError

T = TypeVar("T")
OnRetry = Callable[[str, float], None]


@dataclass(frozen=True)
class Retry:
    """Attempts for one blob or document, and the waits between them: full jitter over an exponential, capped.

    Source: AWS Architecture Blog, "Exponential Backoff and Jitter": sleep = random(0, min(cap, base * 2 ** attempt)).
    A wait that the server asks for (Retry-After) is a lower bound, itself capped at ``longest_s``.
    """

    attempts: int = 6
    base_s: float = 0.25
    cap_s: float = 20.0
    longest_s: float = 120.0

    def wait_s(self, failures: int, asked_s: float | None) -> float:
        """Return the wait after ``failures`` failed attempts, counted from 0."""
        drawn = random.uniform(0.0, min(self.cap_s, self.base_s * 2.0**failures))  # spreads devices; nothing secret
        return max(drawn, min(asked_s or 0.0, self.longest_s))

    def run(self, attempt: Callable[[], T], on_retry: OnRetry) -> T:
        """Return what ``attempt`` returns in the end. ``on_retry(message, wait_s)`` hears of every wait.

        Raises ``GaveUp`` once the budget is spent, and at once any error that trying again cannot help.
        """
        for failures in range(self.attempts):
            try:
                return attempt()
            except (SourceError, ContentError) as error:
                if isinstance(error, SourceError) and not error.retryable:
                    raise
                if failures + 1 == self.attempts:
                    raise GaveUp(f"gave up after {self.attempts} attempts: {error}") from error
                wait_s = self.wait_s(failures, error.retry_after_s if isinstance(error, SourceError) else None)
                on_retry(str(error), wait_s)
                time.sleep(wait_s)
        raise GaveUp("no attempt allowed: attempts must be at least 1")
