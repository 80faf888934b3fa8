"""From real numbers on the grid to integers: to nearest, or adaptively and data-free (SQuant, arXiv 2202.07471)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_ELEMENTS_PER_THREAD = 1 << 16
"""Below this a second thread costs more than it saves."""


def round_nearest(x: Tensor, *, qmin: int, qmax: int) -> Tensor:
    """Return ``x`` rounded to nearest (halves to even) and clamped: int8, the shape and device of ``x``."""
    _check(x, qmin, qmax)
    return torch.round(x.float()).clamp_(qmin, qmax).to(torch.int8)


def adaptive_round(x: Tensor, *, qmin: int, qmax: int) -> Tensor:
    """Return the integers that keep the errors of kernels and channels small, not of single elements alone.

    Args:
        x: real numbers on the grid, finite, ``[O, I, *kernel]``: axis 0 the output channel, axis 1 the input
            channel, the rest the kernel.
        qmin: smallest integer, at least -128.
        qmax: largest integer, at most 127.

    Returns:
        int8, the shape and device of ``x``; each the floor or the ceiling of its ``x``, clamped to the range.

    Nearest (halves to even) is the start. Then in each kernel (where it has more than one element) ``round(|S|)``
    errors of the sign of their sum ``S`` are *flipped* to the other neighbour, largest first, and after that the same
    in each output channel over one candidate for each kernel. Ties go to the lower flat index. An element at or beyond
    either end of the range is never flipped.

    The result is one and the same for any thread count, device, and split of the output channels: a channel's sums are
    taken in float64 in flat order by one thread, on the CPU (a tensor elsewhere makes the round trip). Threads:
    ``torch.get_num_threads()``.

    Raises:
        ValueError: A bad shape, range or NaN.
        ImportError: ``numba`` is missing (extra ``service``).
    """
    _check(x, qmin, qmax)
    try:
        from nestquant._flip_kernels import round_channels
    except ImportError as error:
        raise ImportError("adaptive rounding needs numba: install nestquant-service[service]") from error

    kernel_size = math.prod(x.shape[2:])
    rows = x.detach().to("cpu", torch.float32).reshape(x.shape[0], -1).contiguous().numpy()
    out = np.empty(rows.shape, dtype=np.int8)

    def round_rows(start: int, stop: int) -> None:
        round_channels(rows[start:stop], kernel_size, qmin, qmax, out[start:stop])

    threads = min(torch.get_num_threads(), rows.size // _ELEMENTS_PER_THREAD, rows.shape[0])
    if threads <= 1:
        round_rows(0, rows.shape[0])
    else:
        # Plain threads over a kernel without the GIL: no second thread pool beside torch's, and safe to call from many
        # threads at once.
        cuts = np.linspace(0, rows.shape[0], threads + 1).astype(int).tolist()
        with ThreadPoolExecutor(threads - 1) as pool:
            others = pool.map(round_rows, cuts[1:-1], cuts[2:])
            round_rows(cuts[0], cuts[1])
            list(others)
    return torch.from_numpy(out).reshape(x.shape).to(x.device)


def _check(x: Tensor, qmin: int, qmax: int) -> None:
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"x must have at least 2 dimensions (output channel, input channel) and one element; got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point; got {x.dtype}")
    if not -128 <= qmin < qmax <= 127:
        raise ValueError(f"the range must lie within int8 and hold two integers; got [{qmin}, {qmax}]")
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinity")
