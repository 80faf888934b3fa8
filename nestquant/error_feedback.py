"""Rounding that hands each error on to the inputs not rounded yet (GPTQ, arXiv 2210.17323, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Added to the diagonal, times its mean: inputs that hardly vary must not take on all the error (GPTQ, section 3.3)."""

BLOCK = 128
"""Inputs whose errors are handed on together to those after them (GPTQ, section 3.3, step 2)."""


def error_feedback_round(x: Tensor, *, second: Tensor, low: Tensor, high: Tensor, damping: float = DAMPING) -> Tensor:
    """Return integers ``q`` within ``[low, high]`` that keep ``(q - x) second (q - x)^T`` small: float64, as ``x``.

    Args:
        x: real numbers on the grid, float64 ``[G, R, K]``: groups, output channels of a group, inputs.
        second: second moments (or covariances) of the inputs, float64 ``[G, K, K]``.
        low: smallest integer allowed for each element, ``[G, R, K]``.
        high: largest one.
        damping: see ``DAMPING``.

    The inputs are taken one by one, the strongest first, for all output channels at once. Output channels do not know
    of each other, so a split of them changes nothing but the last bits of a sum.

    Raises:
        ValueError: Shapes do not fit, or ``second`` is not finite.
    """
    groups, _, inputs = x.shape
    if second.shape != (groups, inputs, inputs):
        raise ValueError(
            f"second moments must have shape {(groups, inputs, inputs)} for x {tuple(x.shape)}; "
            f"got {tuple(second.shape)}"
        )
    if not torch.isfinite(second).all():
        raise ValueError("second moments hold NaN or infinity")
    strength = second.diagonal(dim1=1, dim2=2)
    order = torch.argsort(strength, dim=1, descending=True, stable=True)
    columns = order[:, None, :].expand_as(x)
    factor = _feedback(damped(second, damping), order)
    rest = x.gather(2, columns)
    low, high = low.gather(2, columns), high.gather(2, columns)
    q, errors = torch.empty_like(rest), torch.empty_like(rest)
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        for at in range(begin, end):  # one after the other by nature: each step changes all that follow
            value = rest[:, :, at]
            q[:, :, at] = value.round().clamp(low[:, :, at], high[:, :, at])
            error = errors[:, :, at] = (value - q[:, :, at]) / factor[:, at, at, None]
            rest[:, :, at + 1 : end] -= error[:, :, None] * factor[:, None, at, at + 1 : end]
        # What lies beyond the block hears of its errors at once: a product of matrices, not a pass for each input.
        rest[:, :, end:] -= errors[:, :, begin:end] @ factor[:, begin:end, end:]
    return torch.empty_like(q).scatter_(2, columns, q)


def damped(second: Tensor, damping: float) -> Tensor:
    """Return ``second`` ``[G, K, K]`` with ``damping`` times the mean of its diagonal added to the diagonal."""
    mean = second.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=0)
    # An input that is always zero leaves a matrix of zeros: any positive number makes it one of no preference.
    added = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return second + torch.diag_embed(added[:, None].expand(second.shape[:2]))


def _feedback(second: Tensor, order: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse, inputs in ``order``: row ``i`` says where error ``i`` goes."""
    inputs = second.shape[1]
    rows = order[:, :, None].expand(-1, -1, inputs)
    ordered = second.gather(1, rows).gather(2, rows.mT)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
