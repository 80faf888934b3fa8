"""What a layer is quantized to: bits per level, scheme, rounding; validated once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Scheme = Literal["asymmetric", "symmetric"]
Rounding = Literal["adaptive", "nearest"]
Range = Literal["full", "nested"]
Observer = Literal["minmax", "percentile", "mse", "sigma"]

MAX_BITS = 8


def check_bits(bits: tuple[int, ...]) -> None:
    """Raise ValueError unless ``bits`` is a strictly descending tuple of integers in 1..8, such as ``(8, 4)``."""
    if not isinstance(bits, tuple) or not bits:
        raise ValueError(
            f"bits must be a tuple of one to {MAX_BITS} integers, full bits first, such as (8, 4); got {bits!r}"
        )
    for width in bits:
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= MAX_BITS:
            raise ValueError(f"bits must be integers from 1 to {MAX_BITS}; got {width!r} in {bits!r}")
    if any(upper <= lower for upper, lower in pairwise(bits)):
        raise ValueError(f"bits must descend strictly, full bits first, such as (8, 6, 4); got {bits!r}")


def level_shifts(bits: tuple[int, ...]) -> tuple[int, ...]:
    """Return by how many bits each level after the first shifts what is below it; ``(8, 6, 3)`` gives ``(3, 2)``."""
    return tuple(upper - lower for upper, lower in pairwise(bits))[::-1]


def level_bits(bits: tuple[int, ...]) -> tuple[int, ...]:
    """Return the signed bits stored per weight and level: the high bits, then each shift plus one.

    Why one more than the shift: ``nesting.decompose``.
    """
    return (bits[-1], *(shift + 1 for shift in level_shifts(bits)))


@dataclass(frozen=True)
class NestConfig:
    """Bits per level, scheme, rounding and range of a layer.

    ``bits`` names the grids that the model can run on, full bits first: ``(8, 4)`` is one nesting, ``(8, 6, 4)`` has
    three levels, ``(8,)`` is plain INT8. Levels count the other way round, in the order in which a device gets them:
    level 0 is *high*, the coarsest grid, and each further level is the *low* part that refines it to the next grid.

    ``range``: where a channel's largest weight lies on the full-bit grid. ``full``: at its last integer (127 of 8
    bits), which no coarser grid reaches (126, 124 and 112 at 7, 6 and 4). ``nested``: at the last one that the
    coarsest grid reaches.
    """

    bits: tuple[int, ...] = (8, 4)
    scheme: Scheme = "asymmetric"
    rounding: Rounding = "adaptive"
    range: Range = "full"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme must be one of {get_args(Scheme)}; got {self.scheme!r}")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding must be one of {get_args(Rounding)}; got {self.rounding!r}")
        if self.range not in get_args(Range):
            raise ValueError(f"range must be one of {get_args(Range)}; got {self.range!r}")
        if self.scheme == "symmetric" and self.full_bits < 2:
            raise ValueError(
                "the symmetric scheme needs at least 2 full bits: with 1 bit its only positive step is missing"
            )

    @property
    def full_bits(self) -> int:
        """Bits of the finest grid."""
        return self.bits[0]

    @property
    def high_bits(self) -> int:
        """Bits of the coarsest grid, the one of level 0."""
        return self.bits[-1]

    @property
    def level_count(self) -> int:
        """Number of levels; 2 for one nesting."""
        return len(self.bits)

    @property
    def shifts(self) -> tuple[int, ...]:
        """Shifts of the levels after level 0: the bits by which the grid of level ``k`` exceeds that of ``k - 1``."""
        return level_shifts(self.bits)

    @property
    def level_bits(self) -> tuple[int, ...]:
        """Signed bits stored per weight and level (`level_bits`)."""
        return level_bits(self.bits)

    @property
    def range_steps(self) -> int | None:
        """Steps of the full-bit grid that a channel's range takes, as `nestquant.affine.choose_qparams` counts them.

        None, all that there are, for the range ``full``, and where the coarsest grid has fewer than 3 bits: what ends
        with it would cost the full-bit mode a quarter of its steps and more.
        """
        if self.range == "full" or self.high_bits < 3:
            return None
        width = self.high_bits - 1 if self.scheme == "symmetric" else self.high_bits
        return ((1 << width) - 1) << (self.full_bits - self.high_bits)

    def grid_bits(self, level: int) -> int:
        """Return the bits of the grid that levels ``0..level`` add up to; IndexError if there is no such level."""
        if not 0 <= level < self.level_count:
            raise IndexError(f"level must be from 0 to {self.level_count - 1} for bits {self.bits}; got {level}")
        return self.bits[-1 - level]


def signed_range(bits: int) -> tuple[int, int]:
    """Return the smallest and largest integer of ``bits`` signed bits (two's complement)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
