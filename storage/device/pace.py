"""How fast bytes may come, and how slowly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from storage.device.errors import SourceError


@dataclass(frozen=True)
class Pace:
    """``most``: bandwidth cap in bytes/s. ``least``: fewer bytes/s over ``window_s`` count as a dead connection."""

    most: int | None = None
    least: int = 512
    window_s: float = 30.0

    def keep(self, chunks: Iterator[bytes], key: str, clock: Callable[[], float] = time.monotonic) -> Iterator[bytes]:
        """Pass chunks on, no faster than ``most``; raise ``SourceError`` once they come slower than ``least``."""
        begun = window = clock()
        moved = in_window = 0
        for chunk in chunks:
            yield chunk
            moved, in_window = moved + len(chunk), in_window + len(chunk)
            now = clock()
            if now - window >= self.window_s:
                if in_window < self.least * (now - window):
                    raise SourceError(
                        f"{key}: {in_window} bytes in {now - window:.0f} s, slower than {self.least} bytes/s"
                    )
                window, in_window = now, 0
            if self.most is not None and (ahead := moved / self.most - (now - begun)) > 0:
                time.sleep(ahead)
                window += ahead  # time that we slept is not held against the server
