"""Architectures that people deploy, exported: each layer runs on integers or is listed as one that does not, weights
alone compute what torch computes, and 8-bit activations stay within what was measured for the network.

``pytest -s`` prints a row for each, as docs/engines.md has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nestquant.engines.images import Preprocessing
from nestquant.engines.ort import options, session_with
from nestquant.engines.weights import engine_tensors
from storage.engine_layout import read_layout
from storage.manifest import EngineRecord, Manifest
from storage.registry import Registry
from tests.benchmarks.engines_accuracy import NETWORKS as KNOWN
from tests.engines.published import publish, torch_answers
from workers.engines.export import ExportTask, export_version
from workers.inputs.checkpoint import random_state, save_state
from workers.inputs.images import open_images

IMAGES = 8


@dataclass(frozen=True)
class Network:
    """An architecture and bounds, half as much again as what was measured of it: the largest difference of an answer
    from torch's, full-bit and part-bit, with 8-bit activations, as a part of the spread of all answers.
    """

    arch: str
    full: float
    part: float
    library: str = "timm"
    kwargs: dict[str, Any] = field(default_factory=dict)
    kept_float: Sequence[str] = ()
    slow: bool = True

    @property
    def name(self) -> str:
        return self.arch


# timm sets the last BatchNorm of a residual block to zero, until it is trained: no product of such a layer counts.
TRAINED = {"zero_init_last": False}
NETWORKS = (
    Network("resnet20_cifar10", 0.04, 0.03, slow=False),
    Network("resnet56_cifar10", 0.045, 0.03),
    Network("vit_cifar10_p4_d128_l4", 0.012, 0.012, slow=False),
    Network("fdmobilenet_wd2", 0.02, 0.022),
    Network("menet108_8x1_g3", 0.085, 0.19),
    Network("squeezenet_v1_1", 0.11, 0.08),
    Network("efficientnet_lite0", 0.026, 0.03),
    Network("resnet18", 0.008, 0.01, kwargs=TRAINED),
    Network("resnet50", 0.01, 0.01, kwargs=TRAINED),
    Network("mobilenetv2_100", 0.036, 0.036),
    Network("mobilenetv3_small_100", 0.03, 0.035, slow=False),
    Network("mobilenetv3_large_100", 0.038, 0.08),
    Network("shufflenetv2_wd2", 0.01, 0.014, "pytorchcv"),
    Network("deit_tiny_patch16_224", 0.025, 0.026),
    Network("swin_tiny_patch4_window7_224", 0.012, 0.015),
)


def document_of(network: Network, folder: Path, data: Path) -> dict[str, Any]:
    """Return the network's job: real weights and images where the test data has them, else seeded random ones."""
    if network.arch in KNOWN:
        known = KNOWN[network.arch]
        document: dict[str, Any] = known.spec((8, 4), folder / "store", samples=32).model_dump(exclude_unset=True)
        return document | {
            "model": document["model"] | {"checkpoint": str(data / "weights" / f"{known.name}.safetensors")}
        }
    checkpoint = save_state(
        random_state(network.library, network.arch, network.kwargs, seed=7), folder / "w.safetensors"
    )
    # Noise of patches: pixels that differ one by one come to nothing in an average.
    noise = np.random.default_rng(3).integers(0, 256, (IMAGES, 14, 14, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", x=noise.repeat(16, 1).repeat(16, 2))
    return {
        "name": "net",
        "model": {
            "library": network.library,
            "arch": network.arch,
            "kwargs": network.kwargs,
            "checkpoint": str(checkpoint),
        },
        "quantize": {"recipe": "paper", "bits": [8, 4], "activations": {"bits": 8}},
        "preprocess": {"size": 224},
        "calibration": {"data": str(folder / "images.npz"), "samples": IMAGES, "batch_size": 4},
        "store": {"uri": str(folder / "store")},
    }


def answers(
    registry: Registry, manifest: Manifest, engine: EngineRecord, inputs: np.ndarray, level: int, **kept: str
) -> np.ndarray:
    """Return what ONNX Runtime answers at a level; ``optimized`` names a file for the graph that it made of ours."""
    layout, values = read_layout(registry.get_blob(engine.layout), manifest)
    tensors = {one.name: array for one, array in engine_tensors(manifest, layout, values, registry.get_blob, level)}
    chosen = options(threads=1, float_weights=not engine.activations, exact=True)
    if "optimized" in kept:
        chosen.optimized_model_filepath = kept["optimized"]
    logits: np.ndarray = session_with(registry.get_blob(engine.graph), tensors, chosen).run(None, {"image": inputs})[0]
    return logits


def layers_in_float(optimized: Path, registry: Registry, manifest: Manifest, engine: EngineRecord) -> set[str]:
    """Return the layers whose integers ONNX Runtime still turns into floats on every run."""
    layout, _ = read_layout(registry.get_blob(engine.layout), manifest)
    layers = {tensor.name: tensor.layer for tensor in layout.tensors if tensor.role == "weight"}
    nodes = onnx.load(str(optimized), load_external_data=False).graph.node
    return {
        layers[name] for node in nodes if node.op_type == "DequantizeLinear" for name in node.input if name in layers
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "network",
    [pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.slow else []) for one in NETWORKS],
)
def test_a_network_is_exported_and_computes_what_torch_computes(
    network: Network, tmp_path: Path, test_data: Path
) -> None:
    document = document_of(network, tmp_path, test_data)
    document["quantize"]["scheme"] = "symmetric"
    document["quantize"]["activations"]["first_layer"] = "quantized"  # as the engine has it
    document["export"] = {"engines": ["onnx"]}
    registry, manifest = publish(document)
    engine = manifest.engine("onnx")
    assert engine is not None
    preprocessing = Preprocessing.from_record(manifest.preprocessing or {})
    calibration = open_images(document["calibration"]["data"])
    inputs = next(calibration.batches(preprocessing, batch_size=IMAGES))[0].numpy()

    apart = []
    for level in (0, 1):
        optimized = tmp_path / f"{level}.onnx"
        seen = answers(registry, manifest, engine, inputs, level, optimized=str(optimized))
        expected = torch_answers(registry, manifest, inputs, level=level, activations=True)
        apart.append(float(np.abs(seen - expected).max() / np.ptp(expected)))
        assert layers_in_float(optimized, registry, manifest, engine) == set(network.kept_float)
    layout, _ = read_layout(registry.get_blob(engine.layout), manifest)
    assert [kept.name for kept in layout.kept_float] == list(network.kept_float)

    # The same version without ranges: weights alone, where nothing but the order of sums may differ.
    plain = manifest.model_copy(
        update={"layers": tuple(layer.model_copy(update={"activation": None}) for layer in manifest.layers)}
    )
    record = export_version(ExportTask(store_uri=document["store"]["uri"], engine="onnx", manifest=plain))
    assert not record.activations
    exact = []
    for level in (0, 1):
        seen = answers(registry, plain, record, inputs, level)
        expected = torch_answers(registry, manifest, inputs, level=level, activations=False)
        exact.append(float(np.abs(seen - expected).max() / np.ptp(expected)))
    print(
        f"\n| {network.name} | {len(manifest.layers)} | {len(network.kept_float)} | {max(exact):.1e} "
        f"| {apart[1]:.3f} | {apart[0]:.3f} |"
    )
    assert max(exact) < 5e-6
    assert apart[1] < network.full
    assert apart[0] < network.part
