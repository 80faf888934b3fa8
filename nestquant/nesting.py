"""Splitting integers into a coarse part and its refinements, and back (NestQuant, arXiv 2506.17870)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestquant.config import Rounding, check_bits, level_shifts, signed_range
from nestquant.rounding import adaptive_round, round_nearest


def decompose(q: Tensor, bits: tuple[int, ...], *, rounding: Rounding = "adaptive") -> list[Tensor]:
    """Return the levels of ``q``: int8 tensors of its shape ``[O, I, *kernel]``.

    ``q`` holds integers of ``bits[0]`` signed bits. Level 0 is *high*, of ``bits[-1]`` signed bits. Level ``k`` is the
    *low* part that leads from the grid of ``bits[-k]`` to that of ``bits[-k - 1]``. The grids are left from the top
    down (8 over 6 over 4: ``q8 -> q6 -> q4``), so each low part is exact.

    A low part between grids ``s`` bits apart needs ``s + 1`` signed bits. Let ``x = q / 2^s``. Rounding gives
    ``high``, the floor or the ceiling of ``x``, unless that is above the coarse grid's largest integer ``t = 2^(h-1) -
    1``.

    - Floor or ceiling: ``|x - high| < 1``, so ``low = q - high * 2^s = 2^s * (x - high)`` lies in ``(-2^s, 2^s)``.
    - Clamped at the top: ``high = t`` and ``t < x <= (2^(n-1) - 1) / 2^s``, so ``0 < low <= 2^(n-1) - 1 - (2^(n-1) -
      2^s) = 2^s - 1``.
    - At the bottom nothing is clamped: ``x >= -2^(n-1) / 2^s = -2^(h-1)``, the coarse grid's smallest integer.

    So ``low`` lies in ``[-2^s, 2^s - 1]`` always, and ``q = high * 2^s + low`` is exact.
    """
    check_bits(bits)
    _check_range(q, bits[0], "q")
    round_to = adaptive_round if rounding == "adaptive" else round_nearest
    value = q.to(torch.int8)
    levels: list[Tensor] = []
    for coarse_bits, shift in zip(bits[1:], reversed(level_shifts(bits)), strict=True):
        qmin, qmax = signed_range(coarse_bits)
        coarse = round_to(value.float().div_(1 << shift).clamp_(qmin, qmax), qmin=qmin, qmax=qmax)
        # No overflow: coarse * 2^s is an n-bit integer itself, and the difference is in range by the proof above.
        levels.append(value - coarse * (1 << shift))
        value = coarse
    return [value, *reversed(levels)]


def recompose(parts: Sequence[Tensor], bits: tuple[int, ...]) -> Tensor:
    """Return the integers on the grid of the highest level in ``parts`` (level 0 first): int8, the shape of each part.

    With all the levels this is ``q`` again, exactly; with fewer, the integer of that coarser grid.

    Raises:
        ValueError: The parts are none or too many, differ in shape, or add up to integers beyond their grid, as parts
            of different versions would.
    """
    check_bits(bits)
    if not 1 <= len(parts) <= len(bits):
        raise ValueError(f"bits {bits} have 1 to {len(bits)} parts; got {len(parts)}")
    if any(part.shape != parts[0].shape for part in parts):
        raise ValueError(f"all parts must have one shape; got {[tuple(part.shape) for part in parts]}")
    value = parts[0].to(torch.int16)
    for shift, part in zip(level_shifts(bits), parts[1:], strict=False):
        value = (value << shift).add_(part)
    _check_range(value, bits[-len(parts)], "the recomposed integers")
    return value.to(torch.int8)


def to_full_grid(value: Tensor, bits: tuple[int, ...], level: int) -> Tensor:
    """Return integers of ``level``'s grid as integers of the full-bit grid: ``value * 2^shift``, int8, same shape.

    A grid of ``h`` bits shifted by ``n - h`` holds ``n`` signed bits, so one engine graph, scale and zero point serves
    all modes.
    """
    shift = bits[0] - bits[-1 - level]
    return value.to(torch.int8) << shift if shift else value.to(torch.int8)


def _check_range(value: Tensor, bits: int, what: str) -> None:
    if value.is_floating_point():
        raise ValueError(f"{what} must be integers; got {value.dtype}")
    if value.numel() == 0:
        raise ValueError(f"{what} must have at least one element")
    low, high = signed_range(bits)
    seen_low, seen_high = (int(end) for end in torch.aminmax(value))
    if seen_low < low or seen_high > high:
        raise ValueError(f"{what} must lie in [{low}, {high}] ({bits} signed bits); got [{seen_low}, {seen_high}]")
