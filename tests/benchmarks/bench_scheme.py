"""Symmetric against asymmetric weights: ``python -m tests.benchmarks.bench_scheme [NETWORK ...]``.

Each row is two real jobs at 8 over 4 that differ in ``quantize.scheme`` alone, pulled back as a device and measured on
the same evaluation images, weights only. Beside top-1: how far the logits are from the float network's, relative to
their own spread (root of mean squares), which tells two schemes apart on fewer images than top-1 does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.driver import run_job
from jobs.spec.file import parse_spec
from storage.device import Device, StoreSource
from storage.stores.uri import open_store
from tests.benchmarks.accuracy_table import DATA, Known
from tests.benchmarks.engines_accuracy import NETWORKS, SAMPLES
from workers import runtime
from workers.executor import InProcessExecutor
from workers.inputs.checkpoint import open_network
from workers.inputs.images import open_images

SCHEMES = ("asymmetric", "symmetric")


def logits_of(network: torch.nn.Module, batches: list[torch.Tensor]) -> np.ndarray:
    """Return all answers, float32 ``[images, classes]``."""
    with torch.inference_mode():
        return np.concatenate([network(batch).numpy() for batch in batches])


def measure(known: Known, recipe: str, limit: int | None, rounding_range: str, folder: Path) -> None:
    """Print the rows of one network and recipe."""
    images, batches, labels = open_images(DATA / "images" / known.images), list[torch.Tensor](), list[np.ndarray]()
    answers: dict[tuple[str, int], np.ndarray] = {}
    plain: np.ndarray | None = None
    for scheme in SCHEMES:
        store = folder / scheme
        document: dict[str, Any] = known.spec((8, 4), store, recipe=recipe, samples=SAMPLES).model_dump(
            exclude_unset=True
        )
        document["quantize"] = {"recipe": recipe, "bits": [8, 4], "scheme": scheme, "range": rounding_range}
        spec = parse_spec(document, where=known.name)
        run_job(spec, InProcessExecutor())
        device = Device(folder / f"device-{scheme}", StoreSource(open_store(spec.store.uri)), unsigned=True)
        device.pull(known.name)
        device.upgrade(known.name)
        model = runtime.load(device.manifest(known.name), device.blob_path)
        if plain is None:
            for inputs, truth in images.batches(model.preprocessing, batch_size=20, stop=limit):
                batches.append(inputs)
                labels.append(truth.numpy())
            plain = logits_of(open_network(known.task(spec, "float", None, None).network), batches)
        model.set_residency("expanded")
        for level in (0, 1):
            model.to_level(level)
            answers[scheme, level] = logits_of(model.network, batches)
    assert plain is not None
    truth = np.concatenate(labels)
    spread = float(np.sqrt(((plain - plain.mean(1, keepdims=True)) ** 2).mean()))
    for level, word in ((1, "full"), (0, "part")):
        right = [answers[scheme, level].argmax(1) == truth for scheme in SCHEMES]
        error = [float(np.sqrt(((answers[scheme, level] - plain) ** 2).mean())) / spread for scheme in SCHEMES]
        # One standard error of the difference: images that one of the two answers right, and the other does not.
        noise = 100 * float(np.sqrt((right[0] != right[1]).sum())) / len(truth)
        top1 = [100 * float(one.mean()) for one in right]
        print(
            f"| {known.name} | {recipe} | {len(truth)} | {word} | {100 * float((plain.argmax(1) == truth).mean()):.2f} "
            f"| {top1[0]:.2f} | {top1[1]:.2f} | {top1[1] - top1[0]:+.2f} ± {noise:.2f} "
            f"| {error[0]:.4f} | {error[1]:.4f} |",
            flush=True,
        )


def main() -> None:
    """Print a table of the networks asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"default: all of {', '.join(NETWORKS)}")
    parser.add_argument("--recipe", action="append", choices=("paper", "data_free", "calibrated"))
    parser.add_argument("--range", default="full", choices=("full", "nested"))
    parser.add_argument("--limit", type=int, help="the first so many images; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| network | recipe | images | level | float | asymmetric | symmetric | difference | error: asymmetric "
        "| symmetric |"
    )
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for recipe in arguments.recipe or ("paper", "calibrated"):
        for name in arguments.networks or NETWORKS:
            with tempfile.TemporaryDirectory(prefix="nestquant-scheme-") as folder:
                measure(NETWORKS[name], recipe, arguments.limit, arguments.range, Path(folder))


if __name__ == "__main__":
    main()
