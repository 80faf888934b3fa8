"""Ranges of activations: one mergeable histogram per tensor, and the rules that read a range from it.

A histogram's counts are integers and its bin width is a power of two that follows from the largest magnitude alone, so
that merging is exactly associative and commutative: any split of the data over workers, in any order, gives the same
histogram, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestquant.config import Observer

SIGMAS = {8: 25.0, 6: 14.0, 4: 12.0}
"""Width of the data-free range in standard deviations, by bits (NestQuant, arXiv 2506.17870)."""

_HALF_BINS = 4096
"""Bins on each side of zero; 64 KiB of counts."""
_MIN_EXPONENT = -160
"""Bin width of all-zero data; below the smallest float32 (2^-149) shared by all the bins on one side."""
_CHUNK = 1 << 17
_MSE_CANDIDATES = 128


@dataclass(frozen=True)
class ActivationQParams:
    """Range ``[low, high]`` of a tensor, quantized to ``bits`` bits: ``x ~ scale * (q - zero_point)``.

    The range holds zero. ``signed``: ``q`` in ``[-2^(bits-1), 2^(bits-1) - 1]``, otherwise ``[0, 2^bits - 1]``.
    """

    low: float
    high: float
    signed: bool
    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"activation bits must be from 2 to 8; got {self.bits}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0 <= self.high):
            raise ValueError(f"an activation range must be finite and hold zero; got [{self.low}, {self.high}]")
        if not self.signed and self.low < 0:
            raise ValueError(f"an unsigned activation range cannot start below zero; got {self.low}")

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return self.qmin + (1 << self.bits) - 1

    @property
    def scale(self) -> float:
        """Step of the grid; 1 for an empty range, and at least float32's smallest normal number."""
        extent = self.high - self.low
        return max(extent / ((1 << self.bits) - 1), float(np.finfo(np.float32).tiny)) if extent else 1.0

    @property
    def zero_point(self) -> int:
        """The integer that stands for zero."""
        return min(max(self.qmin - round(self.low / self.scale), self.qmin), self.qmax)


def fake_quantize(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """Return ``x`` quantized and dequantized: shape, dtype and device of ``x``; values beyond the range are clipped."""
    result = torch.fake_quantize_per_tensor_affine(
        x.float(), qparams.scale, qparams.zero_point, qparams.qmin, qparams.qmax
    )
    return result.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in bins of width ``2^exponent``, ``counts[i]`` those in ``[i - half, i + 1 - half) * width``.

    ``counts``: int64 ``[2 * half]``. ``low`` and ``high``: exact extremes, 0 included. Empty: see ``empty``.
    """

    exponent: int
    counts: NDArray[np.int64]
    low: float
    high: float

    @classmethod
    def empty(cls) -> Histogram:
        """Return the histogram of no data, the neutral element of ``merge``."""
        return cls(_MIN_EXPONENT, np.zeros(2 * _HALF_BINS, dtype=np.int64), 0.0, 0.0)

    @classmethod
    def of(cls, values: Tensor | NDArray[np.floating[Any]]) -> Histogram:
        """Return the histogram of all the elements of a tensor, taken as float32; ValueError for NaN or infinity."""
        tensor = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
        flat = tensor.to("cpu", torch.float32).reshape(-1)
        if not flat.numel():
            return cls.empty()
        # Adding zero turns -0.0 into 0.0, which compares equal but is other bytes.
        low, high = (float(end) for end in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("activations hold NaN or infinity")
        low, high = min(low, 0.0) + 0.0, max(high, 0.0) + 0.0
        exponent = _exponent(max(-low, high))
        counts = torch.zeros(2 * _HALF_BINS, dtype=torch.int64)
        for chunk in torch.split(flat, _CHUNK):
            # In float64 the product with a power of two is exact, also for subnormal values.
            index = chunk.double().mul_(2.0**-exponent).floor_().to(torch.int32).add_(_HALF_BINS)
            counts += torch.bincount(index, minlength=2 * _HALF_BINS)
        return cls(exponent, counts.numpy(), low, high)

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both data sets together."""
        exponent = max(self.exponent, other.exponent)
        counts = _coarsen(self.counts, exponent - self.exponent) + _coarsen(other.counts, exponent - other.exponent)
        return Histogram(exponent, counts, min(self.low, other.low), max(self.high, other.high))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        filled = np.flatnonzero(self.counts)
        first, last = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 0)
        counts = self.counts[first:last].tolist()
        return {"exponent": self.exponent, "first": first, "counts": counts, "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Histogram:
        """Return the histogram that ``to_dict`` described; ValueError if its counts do not fit."""
        first, counts = int(state["first"]), np.asarray(state["counts"], dtype=np.int64)
        if first < 0 or first + counts.size > 2 * _HALF_BINS or (counts < 0).any():
            raise ValueError(f"a histogram has {2 * _HALF_BINS} counts, none negative; got {counts.size} from {first}")
        full = np.zeros(2 * _HALF_BINS, dtype=np.int64)
        full[first : first + counts.size] = counts
        return cls(int(state["exponent"]), full, float(state["low"]), float(state["high"]))

    def centers(self) -> NDArray[np.float64]:
        """Return the middle of each bin: float64 ``[2 * half]``."""
        middles: NDArray[np.float64] = np.ldexp(np.arange(-_HALF_BINS, _HALF_BINS) + 0.5, self.exponent)
        return middles


def activation_range(
    histogram: Histogram,
    *,
    observer: Observer,
    bits: int = 8,
    percentile: float = 99.99,
    sigmas: float | None = None,
) -> ActivationQParams:
    """Return the range that ``observer`` reads from ``histogram``; signed where a value below zero was seen.

    - ``minmax``: from the smallest value to the largest.
    - ``percentile``: ``percentile`` of the values lie at or below the upper end, as many at or above the lower one.
    - ``mse``: the symmetric clipping of the min-max range with the least mean squared error, of 128 tried.
    - ``sigma``: data-free, for one forward pass of any input: ``sigmas`` standard deviations wide (default
      ``SIGMAS``), from zero up or, signed, around zero.

    Raises:
        ValueError: An empty histogram or a bad setting.
    """
    if observer not in get_args(Observer):
        raise ValueError(f"observer must be one of {get_args(Observer)}; got {observer!r}")
    if not histogram.count:
        raise ValueError("the histogram is empty: no activation was observed")
    signed = histogram.low < 0
    if observer == "percentile":
        low, high = _percentile_range(histogram, percentile)
    elif observer == "mse":
        low, high = _mse_range(histogram, bits)
    elif observer == "sigma":
        low, high = _sigma_range(histogram, bits, sigmas)
    else:
        low, high = histogram.low, histogram.high
    return ActivationQParams(low, high, signed, bits)


def _exponent(magnitude: float) -> int:
    """Return the exponent of the bin width at which ``magnitude`` still falls within the bins."""
    if magnitude == 0:
        return _MIN_EXPONENT
    return max(math.frexp(magnitude)[1] - _HALF_BINS.bit_length() + 1, _MIN_EXPONENT)


def _coarsen(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """Return the counts in bins ``2^doublings`` times as wide: ``floor(floor(x / w) / 2^d) = floor(x / (w * 2^d))``."""
    if doublings == 0:
        return counts
    index = (np.arange(-_HALF_BINS, _HALF_BINS) >> min(doublings, 62)) + _HALF_BINS
    coarse = np.zeros_like(counts)
    np.add.at(coarse, index, counts)
    return coarse


def _percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100; got {percentile}")
    rank = math.ceil(histogram.count * percentile / 100)
    width = math.ldexp(1.0, histogram.exponent)
    upper = int(np.searchsorted(np.cumsum(histogram.counts), rank)) + 1 - _HALF_BINS
    lower = _HALF_BINS - 1 - int(np.searchsorted(np.cumsum(histogram.counts[::-1]), rank))
    high = min(max(upper * width, 0.0), histogram.high)
    return max(min(lower * width, 0.0), histogram.low), high


def _mse_range(histogram: Histogram, bits: int) -> tuple[float, float]:
    filled = histogram.counts > 0
    values = histogram.centers()[filled]
    weights = histogram.counts[filled].astype(np.float64)
    extent = max(-histogram.low, histogram.high)
    best = (math.inf, histogram.low, histogram.high)
    # From the widest down, and only a smaller error wins: of equals, the range that clips least.
    for step in range(_MSE_CANDIDATES, 0, -1):
        clip = extent * step / _MSE_CANDIDATES
        low, high = max(histogram.low, -clip), min(histogram.high, clip)
        grid = ActivationQParams(low, high, low < 0, bits)
        q = np.clip(np.rint(values / grid.scale) + grid.zero_point, grid.qmin, grid.qmax)
        error = float(np.sum(weights * (grid.scale * (q - grid.zero_point) - values) ** 2))
        if error < best[0]:
            best = (error, low, high)
    return best[1], best[2]


def _sigma_range(histogram: Histogram, bits: int, sigmas: float | None) -> tuple[float, float]:
    if sigmas is None and bits not in SIGMAS:
        raise ValueError(f"there is no default width at {bits} bits (only {sorted(SIGMAS)}): give sigmas")
    width = SIGMAS[bits] if sigmas is None else sigmas
    if not width > 0:
        raise ValueError(f"sigmas must be positive; got {width}")
    values, weights = histogram.centers(), histogram.counts / histogram.count
    mean = float(np.sum(weights * values))
    deviation = math.sqrt(float(np.sum(weights * (values - mean) ** 2)))
    if histogram.low < 0:
        return -width / 2 * deviation, width / 2 * deviation
    return 0.0, width * deviation
