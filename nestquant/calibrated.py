"""The recipe ``calibrated``: one weight to its nested levels, by what its inputs look like on calibration images.

For each level, finest first, from the moments of its own inputs (``moments``), in float64:

1. **Target**: the weights that, fed the quantized network's inputs ``y``, come closest to the float layer on ``x``: a
   ridge regression towards the float weights. It undoes what the layers before have lost as far as one layer can.
2. **Rounding**: with error feedback (``error_feedback``) under the covariance of ``y``, since the mean error is the
   bias's to take. Each integer is a floor or a ceiling of the finer level's, so a low part is never wider than the
   paper's.
3. **Bias**: for each output channel the mean of what is still wrong.

One scale and zero point serve all levels, and the recomposition is exact. The range of a channel ends where the
coarsest grid ends, not above it as the paper's does (at 8 over 4, integers from -128 to 112): there the largest weights
would be cut off in part-bit mode. Not so below 3 bits, where that would cost the full-bit mode too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nestquant.affine import choose_qparams, dequantize, to_grid
from nestquant.config import NestConfig, signed_range
from nestquant.error_feedback import damped, error_feedback_round
from nestquant.moments import Moments, from_blocks, in_blocks, input_blocks
from nestquant.nesting import to_full_grid
from nestquant.quantized_weight import QuantizedWeight
from nestquant.weight_transforms import WeightTransform

RIDGE = 0.01
"""Pull of the target towards the float weights, times the mean variance of the inputs (``docs/accuracy.md``)."""


def calibrate_weight(
    weight: Tensor,
    config: NestConfig,
    moments: Sequence[Moments],
    *,
    groups: int = 1,
    transform: WeightTransform | None = None,
    biased: bool = True,
) -> QuantizedWeight:
    """Quantize a float weight ``[O, I / groups, *kernel]`` to levels and biases by the moments of its inputs.

    ``moments[k]`` are those of the network that runs at level ``k``; ``transform`` is what the layer does to its weight
    before it uses it. Without ``biased`` there is nothing to add a bias to: the mean error counts as any other. The
    result depends on nothing else, but BLAS adds in another order on another kind of machine,
    and a tie may fall the other way there.

    Raises:
        ValueError: NaN or infinite weights or moments, or moments of another layer.
    """
    if len(moments) != config.level_count:
        raise ValueError(f"{config.level_count} levels need as many moments; got {len(moments)}")
    inputs = weight[0].numel()
    shape = (groups, weight.shape[0] // groups, inputs)
    flat = weight.detach().double().reshape(shape)
    blocks, size = input_blocks(inputs)
    steps = replace(config, range="nested").range_steps
    qparams = choose_qparams(weight, bits=config.full_bits, scheme=config.scheme, steps=steps)
    used = flat if transform is None else transform.apply(weight.detach()).double().reshape(shape)
    values: list[Tensor] = []
    biases: list[Tensor] = []
    for level in reversed(range(config.level_count)):
        level_moments = moments[level]
        if level_moments.yy.shape != (groups * blocks, size, size):
            raise ValueError(f"moments {tuple(level_moments.yy.shape)} do not fit a weight {tuple(flat.shape)}")
        cross, own = level_moments.centred() if biased else level_moments.second()
        if transform is not None and transform.centred and blocks == 1:
            cross, own = _less_mean_input(cross), _less_mean_input(own)
        low, high = _range(config, level, values[-1] if values else None, flat)
        wish = from_blocks(_target(in_blocks(flat), cross, own), groups, inputs)
        target = to_grid(wish.reshape(weight.shape), qparams).double().reshape(shape) / (
            1 << config.full_bits - config.grid_bits(level)
        )
        rounded = error_feedback_round(in_blocks(target), second=own, low=in_blocks(low), high=in_blocks(high))
        value = from_blocks(rounded, groups, inputs)
        values.append(value)
        if not biased:
            continue
        integers = to_full_grid(value.reshape(weight.shape).to(torch.int8), config.bits, level)
        run = dequantize(integers, qparams)
        if transform is not None:
            run = transform.apply(run)
        biases.append(_bias(used, run.double().reshape(shape), level_moments))
    parts = [values[-1]]
    for coarse, fine, shift in zip(reversed(values), reversed(values[:-1]), config.shifts, strict=False):
        parts.append(fine - coarse * (1 << shift))
    shaped = tuple(part.reshape(weight.shape).to(torch.int8) for part in parts)
    return QuantizedWeight(qparams, shaped, config, torch.stack(biases[::-1]) if biased else None)


def _less_mean_input(covariance: Tensor) -> Tensor:
    """Return the covariances ``[G, K, K]`` of inputs from which, at each position, their mean was taken off.

    A weight less its mean, times inputs, is the weight times inputs less their mean.
    """
    rows = covariance - covariance.mean(dim=1, keepdim=True)
    less: Tensor = rows - rows.mean(dim=2, keepdim=True)
    return less


def _target(flat: Tensor, cross: Tensor, own: Tensor) -> Tensor:
    """Return the ``[G, R, K]`` weights ``t`` with the least ``|w x - t y|^2 + ridge |t - w|^2``, both centred."""
    regular = damped(own, RIDGE)
    # ``regular - own`` is the ridge: the same on both sides, so that exact inputs leave the weights as they are.
    right = flat @ (cross + (regular - own))
    target: Tensor = torch.linalg.solve(regular, right.mT).mT
    return target


def _range(config: NestConfig, level: int, finer: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers allowed at a level: its grid's, and such that ``low`` fits ``shift + 1`` signed bits."""
    qmin, qmax = signed_range(config.grid_bits(level))
    if finer is None:
        qmin = -qmax if config.scheme == "symmetric" else qmin
        return torch.full_like(like, qmin), torch.full_like(like, qmax)
    step = 1 << config.shifts[level]
    low = torch.ceil((finer - (step - 1)) / step)
    high = torch.floor((finer + step) / step)
    return low.clamp(qmin, qmax), high.clamp(qmin, qmax)


def _bias(used: Tensor, run: Tensor, moments: Moments) -> Tensor:
    """Return float16 ``[O]``: the mean of the float layer's output less that of the weights ``run`` at a level."""
    groups, _, inputs = used.shape
    x, y = (from_blocks(sums[:, None], groups, inputs).mT for sums in (moments.x, moments.y))
    bias = ((used @ x - run @ y).reshape(-1) / moments.count).to(torch.float16)
    if not torch.isfinite(bias).all():
        raise ValueError("a bias leaves float16: check the checkpoint and the preprocessing")
    return bias
