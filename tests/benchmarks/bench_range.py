"""What ``quantize.range: nested`` gives and costs: ``python -m tests.benchmarks.bench_range NETWORK ...``.

Weights alone are quantized.
A network is ``library/architecture`` (seeded random weights: relative error of the answers on eight images of noise) or
the name of one of the test data (top-1 on its evaluation set). ``plain`` is a grid of the part-bit's width, not nested.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import torch
from safetensors.torch import load_file
from torch import nn

from nestquant.config import NestConfig, Range
from nestquant.quantized_weight import quantize_weight
from nestquant.surgery import channel_first, find_layers, from_channel_first
from tests.benchmarks.accuracy_table import DATA, MODELS, Known
from workers.evaluate import top1
from workers.inputs import networks
from workers.inputs.checkpoint import random_state
from workers.inputs.images import open_images

WIDTHS = ((8, 7), (8, 6), (8, 4))


def weights_at(state: dict[str, torch.Tensor], network: nn.Module, config: NestConfig, level: int) -> None:
    """Put the weights of a level into the network: ``state`` are the float ones."""
    network.load_state_dict(state)
    for site in find_layers(network).layers:
        weight = channel_first(state[site.state_key], site.kind, site.groups)
        value = quantize_weight(weight, config).dequantize(level)
        network.get_parameter(site.state_key).data.copy_(from_channel_first(value, site.kind, site.groups))


def rows(network: nn.Module, judge: Callable[[nn.Module], float]) -> Iterator[str]:
    """Yield a line for each nesting: plain width, then part and full of each range."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for bits in WIDTHS:
        weights_at(state, network, NestConfig(bits[-1:]), 0)
        cells = [f"plain {judge(network):.4f}"]
        for ends in get_args(Range):
            for level, mode in enumerate(("part", "full")):
                weights_at(state, network, NestConfig(bits, range=ends), level)
                cells.append(f"{ends} {mode} {judge(network):.4f}")
        yield f"  {bits[0]}|{bits[1]}: " + ", ".join(cells)
    network.load_state_dict(state)


def by_noise(library: str, arch: str) -> tuple[nn.Module, Callable[[nn.Module], float]]:
    """Return a seeded network, and the relative error of its answers on noise."""
    network = networks.build(library, arch).eval()
    network.load_state_dict(random_state(library, arch, {}, 0))
    preprocessing = networks.default_preprocessing(library, network)
    size = preprocessing.size if isinstance(preprocessing.size, tuple) else (preprocessing.size,) * 2
    inputs = torch.randn(8, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = network(inputs)

    def error(changed: nn.Module) -> float:
        return float((changed(inputs) - expected).norm() / expected.norm())

    return network, error


def by_images(known: Known) -> tuple[nn.Module, Callable[[nn.Module], float]]:
    """Return a network of the test data, and its top-1 on its evaluation set."""
    network = networks.build(known.library, known.arch or known.name, known.kwargs)
    network.load_state_dict(load_file(DATA / "weights" / f"{known.name}.safetensors"))
    images = open_images(DATA / "images" / known.images)
    preprocessing = replace(networks.default_preprocessing(known.library, network), **known.preprocess)
    return network, lambda changed: top1(changed, images, preprocessing, limit=known.limit).top1


def main() -> None:
    """Print the lines of each network."""
    known = {model.name: model for model in MODELS}
    for name in sys.argv[1:]:
        with torch.inference_mode():
            print(name, "top-1" if name in known else "relative error")
            network, judge = by_images(known[name]) if name in known else by_noise(*name.split("/"))
            for line in rows(network, judge):
                print(line, flush=True)


if __name__ == "__main__":
    main()
