"""Seconds to quantize a network 8 over 4, by stage: ``python -m tests.benchmarks.bench_rounding [arch]``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

from nestquant.affine import choose_qparams, to_grid
from nestquant.config import NestConfig
from nestquant.quantized_weight import quantize_weight
from nestquant.rounding import adaptive_round
from nestquant.surgery import channel_first, find_layers

REPEATS = 5


def best_of(function: Callable[[], Any]) -> float:
    """Return the least of the seconds that ``REPEATS`` runs took."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(arch: str) -> None:
    """Print one line for each thread count."""
    torch.manual_seed(0)
    model = timm.create_model(arch, pretrained=False)
    weights = [
        channel_first(model.get_parameter(site.state_key).detach(), site.kind, site.groups)
        for site in find_layers(model).layers
    ]
    count = sum(weight.numel() for weight in weights)
    full_grid = [to_grid(weight, choose_qparams(weight, bits=8, scheme="asymmetric")) for weight in weights]

    start = time.perf_counter()
    integers = [adaptive_round(x, qmin=-128, qmax=127) for x in full_grid]
    print(f"{arch}: {len(weights)} layers, {count:,} weights; first run {time.perf_counter() - start:.2f} s")
    high_grid = [(q.float() / 16).clamp_(-8, 7) for q in integers]

    def rounded(grids: list[Tensor], bits: int) -> None:
        for x in grids:
            adaptive_round(x, qmin=-(1 << (bits - 1)), qmax=(1 << (bits - 1)) - 1)

    for threads in (1, 2):
        torch.set_num_threads(threads)
        full = best_of(lambda: rounded(full_grid, 8))
        high = best_of(lambda: rounded(high_grid, 4))
        whole = best_of(lambda: [quantize_weight(weight, NestConfig((8, 4))) for weight in weights])
        print(
            f"{threads} threads: full-bit rounding {full:.3f} s, high {high:.3f} s, both {full + high:.3f} s "
            f"({(full + high) / (2 * count) * 1e9:.1f} ns a weight and stage); quantize_weight in all {whole:.3f} s"
        )


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["resnet18"]))
