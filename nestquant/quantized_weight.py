"""One weight to its nested levels: the whole method for one layer, or for some output channels of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nestquant.affine import QParams, choose_qparams, dequantize, to_grid
from nestquant.config import NestConfig, signed_range
from nestquant.nesting import decompose, recompose, to_full_grid
from nestquant.rounding import adaptive_round, round_nearest


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight's grid and its levels: ``parts[0]`` is high, ``parts[k]`` the k-th low; int8 ``[O, I, *kernel]``.

    ``biases``: what each level adds to the layer's bias, float16 ``[levels, O]``; None where no level adds any.
    """

    qparams: QParams
    parts: tuple[Tensor, ...]
    config: NestConfig
    biases: Tensor | None = None

    def dequantize(self, level: int | None = None) -> Tensor:
        """Return the float32 weight that runs with levels ``0..level`` (all of them by default)."""
        last = self.config.level_count - 1 if level is None else level
        self.config.grid_bits(last)
        value = recompose(self.parts[: last + 1], self.config.bits)
        return dequantize(to_full_grid(value, self.config.bits, last), self.qparams)

    def flips(self, weight: Tensor) -> tuple[int, ...]:
        """Return for each level how many of its integers are not the nearest that its grid has to ``weight``.

        ``weight`` is the float one, ``[O, I, *kernel]``, that this was made from.
        """
        x = to_grid(weight.detach(), self.qparams)
        counts = []
        for level in range(self.config.level_count):
            bits = self.config.grid_bits(level)
            qmin, qmax = signed_range(bits)
            if self.config.scheme == "symmetric" and bits == self.config.full_bits:
                qmin = -qmax
            nearest = round_nearest(x / (1 << (self.config.full_bits - bits)), qmin=qmin, qmax=qmax)
            counts.append(int((recompose(self.parts[: level + 1], self.config.bits) != nearest).sum()))
        return tuple(counts)


def quantize_weight(weight: Tensor, config: NestConfig) -> QuantizedWeight:
    """Quantize a float weight ``[O, I, *kernel]``, output channel first, and split it into its levels.

    Each output channel is independent of the others: quantizing rows ``a:b`` alone gives rows ``a:b`` of the whole,
    bit for bit.

    Raises:
        ValueError: NaN or infinite weights or fewer than two dimensions.
    """
    steps = config.range_steps
    qparams = choose_qparams(weight, bits=config.full_bits, scheme=config.scheme, steps=steps)
    qmin, qmax = signed_range(config.full_bits)
    if config.scheme == "symmetric":
        qmin = -qmax
    round_to = adaptive_round if config.rounding == "adaptive" else round_nearest
    q = round_to(to_grid(weight.detach(), qparams), qmin=qmin, qmax=qmax)
    return QuantizedWeight(qparams, tuple(decompose(q, config.bits, rounding=config.rounding)), config)
