"""How many threads torch may use, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads within the block: with one, sums come out the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_threads(count: int) -> None:
    """Let torch and numba use ``count`` threads from now on."""
    torch.set_num_threads(count)
    with suppress(ImportError):
        import numba

        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
