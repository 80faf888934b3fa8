"""What ONNX Runtime answers beside our torch runtime: ``python -m tests.benchmarks.engines_accuracy [NETWORK ...]``.

Each network of the test data is a real job (symmetric weights, 8-bit activations, exported), pulled back as a device.
The same images go through five runs: the float network by ONNX Runtime, and the version, full-bit and part-bit, by
torch and by ONNX Runtime. A Markdown table is printed.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from jobs.driver import run_job
from jobs.spec.file import parse_spec
from jobs.spec.job import JobSpec
from nestquant.engines.images import Preprocessing
from nestquant.engines.onnx import Session
from nestquant.engines.ort import options, session_with
from storage.device import Device, StoreSource
from storage.manifest import ModelRecord
from storage.stores.uri import open_store
from tests.benchmarks.accuracy_table import DATA, MODELS, Known
from workers import runtime
from workers.engines.graph import EngineGraph
from workers.engines.trace import trace
from workers.executor import InProcessExecutor
from workers.inputs.images import open_images

SAMPLES = 256
LITE0 = Known(
    "efficientnet_lite0",
    {"size": 224, "resize": 256, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "imagenet_sample_1000.tar",
    "imagenet_val_1300.tar",
    "timm",
    "tf_efficientnet_lite0",
)
NETWORKS = {known.name: known for known in (*MODELS, LITE0) if known.limit is None}


def exported_spec(known: Known, store: Path, *, recipe: str, first_layer: str = "quantized") -> JobSpec:
    """Return the job of a network, symmetric, 8 over 4, with 8-bit activations, those of the first layer too."""
    document: dict[str, Any] = known.spec((8, 4), store, recipe=recipe, samples=SAMPLES).model_dump(exclude_unset=True)
    document["quantize"]["scheme"] = "symmetric"
    document["quantize"]["activations"]["first_layer"] = first_layer
    return parse_spec(document | {"export": {"engines": ["onnx"]}}, where=known.name)


def pulled(spec: JobSpec, folder: Path) -> Device:
    """Run the job and return a device that has all levels of it."""
    run_job(spec, InProcessExecutor())
    device = Device(folder, StoreSource(open_store(spec.store.uri)), unsigned=True)
    device.pull(spec.name)
    device.upgrade(spec.name)
    return device


def float_graph(record: ModelRecord, preprocessing: Preprocessing, checkpoint: Path) -> bytes:
    """Return the float network as an ONNX model, for the engine to optimize."""
    state = load_file(str(checkpoint))
    graph, _, _ = EngineGraph(trace(record, preprocessing), ()).finish(state, {}, activations=False)
    return graph


@dataclass
class Tally:
    """Answers of one run, in the order of the images."""

    logits: list[np.ndarray] = field(default_factory=list)

    def top1(self, labels: np.ndarray) -> float:
        """Return percent of right answers."""
        return 100 * float((np.concatenate(self.logits).argmax(1) == labels).mean())

    def agreement(self, other: Tally) -> tuple[float, float, float]:
        """Return the percent of images with the same first answer, and the largest and mean difference of logits."""
        mine, theirs = np.concatenate(self.logits), np.concatenate(other.logits)
        apart = np.abs(mine - theirs)
        return 100 * float((mine.argmax(1) == theirs.argmax(1)).mean()), float(apart.max()), float(apart.mean())


def compare(known: Known, recipe: str, first_layer: str, limit: int | None, folder: Path) -> None:
    """Print the rows of one network."""
    spec = exported_spec(known, folder / "store", recipe=recipe, first_layer=first_layer)
    device = pulled(spec, folder / "device")
    manifest = device.manifest(known.name)
    model = runtime.load(manifest, device.blob_path)
    model.quantize_activations(enabled=True)
    model.set_residency("expanded")
    sessions = {level: Session(device, known.name, level=level, threads=1) for level in (0, 1)}
    preprocessing = Preprocessing.from_record(manifest.preprocessing or {})
    graph = float_graph(manifest.model, preprocessing, Path(str(spec.model.checkpoint)))
    plain = session_with(graph, {}, options(threads=1))
    images = open_images(DATA / "images" / known.images)
    count = min(limit or len(images), len(images))
    tallies = {name: Tally() for name in ("float", "torch 0", "torch 1", "onnx 0", "onnx 1")}
    labels = []
    batches = [(inputs, truth) for inputs, truth in images.batches(preprocessing, batch_size=20, stop=count)]
    for inputs, truth in batches:
        batch = inputs.numpy()
        labels.append(truth.numpy())
        tallies["float"].logits.append(plain.run(None, {"image": batch})[0])
        for level, session in sessions.items():
            tallies[f"onnx {level}"].logits.append(session.run(batch).logits)
    for level in (0, 1):
        model.to_level(level)
        with torch.inference_mode():
            tallies[f"torch {level}"].logits += [model.network(inputs).numpy() for inputs, _ in batches]
    truth = np.concatenate(labels)
    for level, word in ((1, "full"), (0, "part")):
        ours, engine = tallies[f"torch {level}"], tallies[f"onnx {level}"]
        same, largest, mean = engine.agreement(ours)
        spread = float(np.ptp(np.concatenate(ours.logits)))
        print(
            f"| {known.name} | {recipe} | {len(truth)} | {word} | {tallies['float'].top1(truth):.2f} "
            f"| {ours.top1(truth):.2f} | {engine.top1(truth):.2f} | {engine.top1(truth) - ours.top1(truth):+.2f} "
            f"| {same:.1f} | {largest:.2f} | {mean:.3f} | {spread:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print a table of the networks asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"default: all of {', '.join(NETWORKS)}")
    parser.add_argument("--recipe", default="calibrated", choices=("paper", "calibrated"))
    parser.add_argument(
        "--first-layer",
        default="quantized",
        choices=("float", "quantized"),
        help="what torch has of the first layer's input; the engine has integers in any case",
    )
    parser.add_argument("--limit", type=int, help="the first so many images; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| network | recipe | images | level | float | torch | ONNX Runtime | apart | same answer, % "
        "| largest difference | mean | spread of logits |"
    )
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in arguments.networks or NETWORKS:
        with tempfile.TemporaryDirectory(prefix="nestquant-engines-") as folder:
            compare(NETWORKS[name], arguments.recipe, arguments.first_layer, arguments.limit, Path(folder))


if __name__ == "__main__":
    main()
