"""Activation statistics of the float network: one mergeable histogram for the input of each layer.

Histograms hold integer counts, so merging is exact; a batch's activations depend on nothing but its images, as every
batch has the same place and size in every split. Any number of workers gives the same ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nestquant.engines.images import Preprocessing
from nestquant.observers import Histogram
from storage.manifest import Record
from workers.forward import check_input, run_network
from workers.inputs.checkpoint import open_network
from workers.inputs.images import fetch_images
from workers.scratch import scratch
from workers.tasks import NetworkRef
from workers.threads import threads

NOISE_SEED = 0
NOISE_BATCH = 8


class CalibrateTask(Record):
    """Observe images ``start:stop`` of the ``samples`` taken of a set, or one batch of noise where ``data`` is None."""

    network: NetworkRef
    layers: tuple[str, ...]
    data: str | None
    samples: int
    start: int
    stop: int
    batch_size: int


class Observed(Record):
    """Histograms by layer (``Histogram.to_dict``), the images that count in them, and those that could not be
    read.
    """

    histograms: dict[str, dict[str, Any]]
    samples: int
    skipped: tuple[tuple[str, str], ...]


@torch.inference_mode()
def observe(task: CalibrateTask) -> Observed:
    """Run the float network and count what goes into each layer.

    Raises:
        WorkError: an activation or an answer is NaN or infinite; the message names the layer.
        ModelError: the network does not run on the images.
    """
    network = open_network(task.network)
    preprocessing = Preprocessing.from_record(task.network.preprocessing)
    # One thread: how a sum is split over threads changes its last bit, and a bit can move a value to the next bin.
    with (
        scratch("calibrate") as folder,
        threads(1),
        observed(network, task.layers) as histograms,
    ):
        if task.data is None:
            shape = (task.batch_size, *preprocessing.input_shape)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_SEED))
            run_network(network, noise, task.network.title)
            samples, skipped = 0, list[tuple[str, str]]()
        else:
            images = fetch_images(task.data, folder).sample(task.samples)
            samples = 0
            for inputs, _ in images.batches(
                preprocessing, batch_size=task.batch_size, start=task.start, stop=task.stop
            ):
                run_network(network, inputs, task.network.title)
                samples += len(inputs)
            skipped = images.skipped
    return Observed(
        histograms={name: histogram.to_dict() for name, histogram in histograms.items()},
        samples=samples,
        skipped=tuple(skipped),
    )


@contextmanager
def observed(network: nn.Module, layers: tuple[str, ...]) -> Iterator[dict[str, Histogram]]:
    """Yield histograms by layer that fill with the layers' inputs whenever the network runs within the block."""
    histograms: dict[str, Histogram] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            tensors = {
                id(value): value for value in args if isinstance(value, Tensor) and torch.is_floating_point(value)
            }
            for tensor in tensors.values():
                check_input(name, tensor.float())
                histogram = Histogram.of(tensor)
                histograms[name] = histograms[name].merge(histogram) if name in histograms else histogram

        return hook

    handles = [network.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        yield histograms
    finally:
        for handle in handles:
            handle.remove()
