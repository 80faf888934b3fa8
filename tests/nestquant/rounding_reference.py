"""Adaptive rounding, slow and obviously right: the oracle for the compiled one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def reference_round(x: NDArray[np.float32], qmin: int, qmax: int) -> NDArray[np.int8]:
    """Round ``x [O, I, *kernel]`` adaptively, one element at a time."""
    kernel_size = math.prod(x.shape[2:])
    rows = x.reshape(x.shape[0], -1).astype(np.float64)
    return np.stack([_round_channel(row, kernel_size, qmin, qmax) for row in rows]).reshape(x.shape).astype(np.int8)


def _round_channel(x: NDArray[np.float64], kernel_size: int, qmin: int, qmax: int) -> NDArray[np.float64]:
    q = np.rint(x)
    error = q - x
    movable = [qmin < value < qmax for value in x]

    def flip_order(indices: list[int], total: float) -> list[int]:
        same_sign = [i for i in indices if movable[i] and error[i] * total > 0]
        return sorted(same_sign, key=lambda i: (-abs(error[i]), i))

    def flip(i: int) -> None:
        step = 1 if error[i] > 0 else -1
        q[i] -= step
        error[i] -= step

    everything = list(range(len(x)))
    candidates = everything
    if kernel_size > 1:
        candidates = []
        for start in everything[::kernel_size]:
            kernel = everything[start : start + kernel_size]
            total = np.cumsum(error[kernel])[-1]
            count = round(abs(total))
            order = flip_order(kernel, total)
            flipped, rest = order[:count], order[count:]
            for i in flipped:
                flip(i)
            if count >= abs(total):
                candidates += flipped[-1:]
            else:
                candidates += rest[:1]
    total = np.cumsum(error)[-1]
    for i in flip_order(candidates, total)[: round(abs(total))]:
        flip(i)
    return np.clip(q, qmin, qmax)
