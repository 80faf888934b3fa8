"""Compiled inner loops of adaptive rounding; imported late, as only quantizing needs numba, never running.

Each output channel is a task of its own and walks its elements in flat order: the sums come out the same on every
machine, thread count and split of the channels. Everything runs in float64, in which ``q - x`` is exact for every
float32 ``x`` of at least ``2^-45``. No ``fastmath``: it would let the compiler change the order.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray


def _next_flip(movable: NDArray[np.float64], start: int, stop: int, sign: float) -> int:
    """Return the element of ``start:stop`` to flip next (largest error of that sign, lowest index), or -1."""
    best = -1
    best_size = 0.0
    for i in range(start, stop):
        size = movable[i] * sign
        if size > best_size:
            best = i
            best_size = size
    return best


def _kernel_pass(
    error: NDArray[np.float64], movable: NDArray[np.float64], q: NDArray[np.float64], start: int, stop: int
) -> int:
    """Flip in one kernel, ``start:stop``; return the index of its candidate for the channel pass, or -1."""
    total = 0.0
    for i in range(start, stop):
        total += error[i]
    sign = 1.0 if total > 0.0 else -1.0
    count = int(np.rint(abs(total)))
    last = -1
    for _ in range(count):
        index = next_flip(movable, start, stop, sign)
        if index < 0:
            break
        last = index
        # Its error has the other sign now, so it is not found again.
        error[index] -= sign
        movable[index] -= sign
        q[index] -= sign
    if count >= abs(total):
        return last
    return int(next_flip(movable, start, stop, sign))


def _channel_pass(
    error: NDArray[np.float64], movable: NDArray[np.float64], q: NDArray[np.float64], candidates: NDArray[np.int64]
) -> None:
    """Flip among ``candidates`` (ascending flat indices) until the error of the whole channel is at most a half."""
    total = 0.0
    for i in range(error.size):
        total += error[i]
    sign = 1.0 if total > 0.0 else -1.0
    sizes = np.empty(candidates.size)
    eligible = 0
    for index in candidates:
        sizes[eligible] = movable[index] * sign
        eligible += movable[index] * sign > 0.0
    count = min(int(np.rint(abs(total))), eligible)
    if count == 0:
        return
    threshold = np.partition(sizes[:eligible], eligible - count)[eligible - count]
    ties = count - int(np.sum(sizes[:eligible] > threshold))
    for index in candidates:
        size = movable[index] * sign
        if size > threshold:
            q[index] -= sign
        elif size == threshold and ties > 0:
            q[index] -= sign
            ties -= 1


def _round_channels(x: NDArray[np.float32], kernel_size: int, qmin: int, qmax: int, out: NDArray[np.int8]) -> None:
    """Round the channels ``x [channels, elements]`` into ``out``; ``elements`` is a multiple of ``kernel_size``."""
    elements = x.shape[1]
    q = np.empty(elements)
    error = np.empty(elements)
    movable = np.empty(elements)
    candidates = np.arange(elements)
    for channel in range(x.shape[0]):
        for i in range(elements):
            value = np.float64(x[channel, i])
            q[i] = np.rint(value)
            error[i] = q[i] - value
            movable[i] = error[i] if qmin < value < qmax else 0.0
        count = elements
        if kernel_size > 1:
            count = 0
            for start in range(0, elements, kernel_size):
                candidate = kernel_pass(error, movable, q, start, start + kernel_size)
                candidates[count] = candidate
                count += candidate >= 0
        channel_pass(error, movable, q, candidates[:count])
        for i in range(elements):
            out[channel, i] = np.int8(min(max(q[i], qmin), qmax))


# Assigned rather than decorated, so that the loops keep their types and can be stepped through uncompiled.
next_flip: Any = numba.njit(nogil=True, cache=True)(_next_flip)
kernel_pass: Any = numba.njit(nogil=True, cache=True)(_kernel_pass)
channel_pass: Any = numba.njit(nogil=True, cache=True)(_channel_pass)
round_channels: Any = numba.njit(nogil=True, cache=True)(_round_channels)
