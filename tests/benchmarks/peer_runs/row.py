"""One row of the comparison with other quantizers, measured inside that quantizer's own environment.

A script beside this one quantizes; what is common stands here: the network of the test data, the calibration images,
top-1 by our own `workers.evaluate.top1`, and a look at the weights that really reach a convolution or product. Asked
and answered in JSON: ``python -m tests.benchmarks.peer_runs.NAME tasks.json`` prints a line of JSON for each task. The
imports cost more than a small network's row, so that each task is a fork of a process that has them: its peak memory
is its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from nestquant.engines.images import Preprocessing
from tests.benchmarks.peer_runs.names import ANSWER
from workers.evaluate import top1
from workers.inputs.images import open_images
from workers.inputs.networks import build

PRODUCTS = {torch.nn.functional.conv2d, torch.conv2d, torch.nn.functional.linear}


@dataclass(frozen=True)
class Task:
    """What a row asks for; ``check_float`` measures the float network too, in the same process.

    ``settings`` are the recipe's own: iterations, epochs, the kind of grid.
    """

    model: str
    library: str
    arch: str
    kwargs: dict[str, Any]
    checkpoint: str
    preprocess: dict[str, Any]
    calibration: str
    images: str
    samples: int
    evaluate_batch: int
    bits: int
    recipe: str
    check_float: bool
    settings: dict[str, Any] = field(default_factory=dict)

    def network(self) -> nn.Module:
        """Return the float network with its trained weights, in eval mode."""
        network = build(self.library, self.arch, self.kwargs)
        network.load_state_dict(load_file(self.checkpoint))
        return network

    def preprocessing(self) -> Preprocessing:
        return Preprocessing.from_record({"interpolation": "bilinear", **self.preprocess})

    def batches(self, batch_size: int) -> list[torch.Tensor]:
        """Return the first ``samples`` calibration images, float32 (B, 3, S, S)."""
        images = open_images(self.calibration)
        found = [
            batch
            for batch, _ in images.batches(self.preprocessing(), batch_size=batch_size, start=0, stop=self.samples)
        ]
        assert not images.skipped, images.skipped
        return found


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product with a weight; ``on_grid``: every channel lies on evenly spaced values.

    As many of them at most as the bits asked for allow. ``most_values``: the most different values in one channel.
    """

    kind: str
    shape: tuple[int, ...]
    on_grid: bool
    most_values: int

    @property
    def weights(self) -> int:
        return int(torch.Size(self.shape).numel())


def on_grid(weight: torch.Tensor, bits: int) -> bool:
    """Return whether each row of ``weight`` (C, K) lies on a grid of at most ``2**bits`` evenly spaced values.

    Looked at are a row's ends and its first 32 values; to fit by chance, nine values at 8 bits have odds of 1e-14.
    """
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    span = torch.where(high > low, high - low, torch.ones_like(low))
    places = ((weight[:, :32] - low) / span).unsqueeze(2) * torch.arange(1, 2**bits)
    return bool(((places - places.round()).abs().amax(dim=1) < 2e-3).any(dim=1).all())


class _Weights(TorchFunctionMode):
    """Notes the weight of each convolution and product with a weight of its own, in the order of execution."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.products: list[Product] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func in PRODUCTS:
            weight = args[1] if len(args) > 1 else keywords["weight"]
            weight = getattr(weight, "value", weight)  # Brevitas' tensor that carries its scale
            if type(weight) not in (torch.Tensor, nn.Parameter):
                weight = weight.dequantize()  # torchao's and AIMET's tensors
            rows = weight.detach().flatten(1)
            most = int((rows.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1).max()) + 1
            self.products.append(Product(func.__name__, tuple(weight.shape), on_grid(rows, self.bits), most))
        return func(*args, **keywords)


@torch.no_grad()
def products(network: nn.Module, images: torch.Tensor, bits: int) -> list[Product]:
    """Return what one forward pass multiplies with: the weights as used, whatever the module calls them."""
    with _Weights(bits) as seen:
        network(images)
    return seen.products


def peak_rss_bytes() -> int:
    """Return this process's peak resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(task: Task, distribution: str, quantize: Callable[[Task, nn.Module], nn.Module]) -> dict[str, Any]:
    """Quantize, look at the weights, count right answers."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    network = quantize(task, task.network()).eval()
    seconds, peak = time.perf_counter() - begin, peak_rss_bytes()
    probe = task.batches(1)[0]
    wanted, found = products(task.network(), probe, task.bits), products(network, probe, task.bits)
    narrow = [product for product in found if product.on_grid]
    preprocessing = task.preprocessing()
    accuracy = top1(network, open_images(task.images), preprocessing, batch_size=task.evaluate_batch)
    answer: dict[str, Any] = {
        "version": version(distribution),
        "torch": torch.__version__,
        "correct": accuracy.correct,
        "images": accuracy.total,
        "seconds": round(seconds, 1),
        "evaluate_seconds": round(accuracy.seconds, 1),
        "peak_rss_bytes": peak,
        "load_average": round(os.getloadavg()[0], 1),
        "products": len(found),
        "products_on_grid": len(narrow),
        "weights": sum(product.weights for product in wanted),
        "weights_on_grid": sum(product.weights for product in narrow),
        "off_grid": [asdict(product) for product in found if not product.on_grid][:8],
    }
    if task.check_float:
        float_accuracy = top1(task.network(), open_images(task.images), preprocessing, batch_size=task.evaluate_batch)
        answer["float"] = float_accuracy.correct
    return answer


def _answer(task: Task, distribution: str, quantize: Callable[[Task, nn.Module], nn.Module]) -> dict[str, Any]:
    try:
        return measured(task, distribution, quantize)
    except Exception as error:  # a quantizer that fails on a network is a row of the table, in its own words
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "/".join(Path(place.filename).parts[-3:])
        return {"version": version(distribution), "error": f"{type(error).__name__}: {error} ({where}, {place.name})"}


def main(distribution: str, quantize: Callable[[Task, nn.Module], nn.Module]) -> None:
    """Do each task of the file in a process of its own, and print its answer on a line of its own."""
    torch.set_num_threads(1)
    for document in json.loads(Path(sys.argv[1]).read_text()):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as stream:
                json.dump(_answer(Task(**document), distribution, quantize), stream)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as stream:
            answer = stream.read()
        _, status = os.waitpid(child, 0)
        ended = json.dumps({"version": version(distribution), "error": f"the process ended with status {status}"})
        print(f"{ANSWER}{answer or ended}", flush=True)
