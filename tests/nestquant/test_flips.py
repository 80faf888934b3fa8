"""Flips: how many integers of each grid are not the nearest to their weights, counted by hand and by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nestquant.config import NestConfig
from nestquant.quantized_weight import quantize_weight


def test_a_kernel_of_equal_errors_is_flipped_where_the_sum_asks_for_it() -> None:
    # Scale 1/8 exactly: 0.3 above an integer eight times sums to 2.4, so two of the nine go up.
    grid = torch.tensor([-64.0, *[10.3] * 8, 63.5])
    weight = (grid / 8).reshape(1, 1, 10)
    config = NestConfig(bits=(8,))
    assert quantize_weight(weight, NestConfig(bits=(8,), rounding="nearest")).flips(weight) == (0,)
    assert quantize_weight(weight, config).flips(weight)[0] > 0


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("rounding", ["adaptive", "nearest"])
def test_every_level_is_counted_against_its_own_grid(scheme: str, rounding: str) -> None:
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(5))
    config = NestConfig(bits=(8, 6, 3), scheme=scheme, rounding=rounding)  # type: ignore[arg-type]
    quantized = quantize_weight(weight, config)
    scale = quantized.qparams.scale.numpy()[:, None, None, None]
    zero = quantized.qparams.zero_point.numpy()[:, None, None, None]
    x = (weight.numpy() / scale + zero).astype(np.float32)
    counts = []
    for level, bits in enumerate((3, 6, 8)):
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        nearest = np.clip(np.round(x / (1 << (8 - bits))), low, high)
        kept = (quantized.dequantize(level).numpy() / scale + zero) / (1 << (8 - bits))
        counts.append(int((np.round(kept) != nearest).sum()))
    assert quantized.flips(weight) == tuple(counts)
    assert (counts[2] == 0) == (rounding == "nearest")
