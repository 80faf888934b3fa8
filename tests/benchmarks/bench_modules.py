"""Milliseconds and bytes of a nested model in both modes: ``python -m tests.benchmarks.bench_modules [arch]``."""

from __future__ import annotations

import sys
import time

import timm
import torch
from torch import nn

from nestquant.config import NestConfig
from nestquant.modules import nest_model, page_in, page_out, resident_bytes, set_residency
from nestquant.nested_weight import pack_parts
from nestquant.quantized_weight import quantize_weight
from nestquant.surgery import channel_first, find_layers

REPEATS = 9
BITS = (8, 4)


def milliseconds(model: nn.Module, x: torch.Tensor) -> float:
    """Return the median of the milliseconds that ``REPEATS`` forwards took."""
    seconds = []
    with torch.inference_mode():
        for _ in range(REPEATS):
            start = time.perf_counter()
            model(x)
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[REPEATS // 2] * 1e3


def main(arch: str) -> None:
    """Print one line for the float model and for each residency and mode."""
    torch.manual_seed(0)
    model = timm.create_model(arch, pretrained=False).eval()
    x = torch.randn(1, 3, 224, 224)
    print(f"{arch}, batch 1, {torch.get_num_threads()} threads")
    print(f"float:              {milliseconds(model, x):7.1f} ms, {resident_bytes(model) / 1e6:6.2f} MB resident")
    weights = {
        site.name: quantize_weight(
            channel_first(model.get_parameter(site.state_key).detach(), site.kind, site.groups), NestConfig(BITS)
        )
        for site in find_layers(model).layers
    }
    lows = {name: pack_parts(weight.parts, BITS)[1] for name, weight in weights.items()}
    nest_model(model, weights)
    for residency in ("packed", "expanded"):
        set_residency(model, residency)
        print(
            f"{residency:8}, full-bit: {milliseconds(model, x):7.1f} ms, {resident_bytes(model) / 1e6:6.2f} MB resident"
        )
        start = time.perf_counter()
        page_out(model)
        out = time.perf_counter() - start
        print(
            f"{residency:8}, part-bit: {milliseconds(model, x):7.1f} ms, {resident_bytes(model) / 1e6:6.2f} MB resident"
        )
        start = time.perf_counter()
        page_in(model, lows)
        print(f"{residency:8}: page_out {out * 1e3:.1f} ms, page_in {(time.perf_counter() - start) * 1e3:.1f} ms")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["resnet18"]))
