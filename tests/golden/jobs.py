"""Golden values: what jobs and real layers came to, byte for byte (``python -m tests.golden.jobs --write``).

Weights are made of integers alone, so that every machine has the same ones; the recipe ``paper`` adds nothing that
differs between machines. Manifests count without their tools' versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.driver import run_job
from jobs.spec.file import parse_spec
from nestquant.config import NestConfig
from nestquant.quantized_weight import quantize_weight
from storage.digest import digest_bytes
from storage.manifest import canonical_json
from storage.registry import Registry
from storage.stores.uri import open_store
from workers.executor import InProcessExecutor
from workers.inputs import networks
from workers.inputs.checkpoint import save_state
from workers.inputs.tensors import TensorReader
from workers.tasks import TensorSource

FOLDER = Path(__file__).resolve().parent
KWARGS = {"num_classes": 10, "in_chans": 3}
RECIPES: dict[str, dict[str, Any]] = {
    "8 over 4": {"bits": [8, 4]},
    "8 over 6 over 4, one layer plain, one float": {
        "bits": [8, 6, 4],
        "ignore": ["conv1.0"],
        "overrides": {"fc": {"bits": [8]}},
    },
    "symmetric, to the nearest": {"bits": [8, 5], "scheme": "symmetric", "rounding": "nearest"},
}
LAYERS = {
    "resnet20_cifar10": (
        "features.init_block.conv.weight",
        "features.stage2.unit2.body.conv1.conv.weight",
        "output.weight",
    ),
    "fdmobilenet_wd2": ("features.stage3.unit2.dw_conv.conv.weight", "output.weight"),
}
CONFIGS = (
    NestConfig(bits=(8, 4)),
    NestConfig(bits=(8, 6)),
    NestConfig(bits=(8, 6, 4)),
    NestConfig(bits=(8, 4), scheme="symmetric"),
    NestConfig(bits=(6, 3), rounding="nearest"),
)


def write_checkpoint(path: Path) -> Path:
    """Write weights for timm's ``test_resnet`` that follow from their position alone (a multiplicative hash)."""
    state = {}
    for number, (name, tensor) in enumerate(
        networks.build("timm", "test_resnet", KWARGS, meta=True).state_dict().items()
    ):
        if not tensor.is_floating_point():
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            continue
        at = np.arange(tensor.numel(), dtype=np.uint64) + np.uint64(1_000_003 * number)
        values = (at * np.uint64(2_654_435_761) % np.uint64(1 << 32)).astype(np.float64) / (1 << 32) - 0.5
        made = torch.from_numpy(values.astype(np.float32)).reshape(tensor.shape)
        state[name] = made.abs() + 0.5 if name.endswith("running_var") else made
    return save_state(state, path)


def job(name: str, folder: Path) -> dict[str, Any]:
    """Run one job and return what it left in its store: the manifest, without versions of tools, and every blob."""
    document = {
        "name": "golden",
        "model": {
            "library": "timm",
            "arch": "test_resnet",
            "kwargs": KWARGS,
            "checkpoint": str(write_checkpoint(folder / "weights.safetensors")),
        },
        "quantize": {"recipe": "paper", **RECIPES[name]},
        "preprocess": {"size": 32},
        "store": {"uri": str(folder / "store"), "shard_bytes": 65536},
    }
    run_job(parse_spec(document, where=name), InProcessExecutor())
    store = open_store(folder / "store")
    manifest = Registry(store).resolve("golden").manifest.model_copy(update={"tool_versions": {}})
    blobs = [f"{info.key.rpartition('/')[2]} {info.size_bytes}" for info in store.list("blobs/")]
    return {"manifest": digest_bytes(canonical_json(manifest)), "blobs": blobs}


def layers(data: Path) -> dict[str, dict[str, Any]]:
    """Return high and low of real layers: SHA-256 of the int8 values of each level, and the first of them."""
    found: dict[str, dict[str, Any]] = {}
    for model, names in LAYERS.items():
        reader = TensorReader(TensorSource(None, str(data / "weights" / f"{model}.safetensors")))
        for name in names:
            weight = reader.read(name)
            for config in CONFIGS:
                quantized = quantize_weight(weight, config)
                key = f"{model} {name} {'|'.join(map(str, config.bits))} {config.scheme} {config.rounding}"
                found[key] = {
                    "levels": [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in quantized.parts],
                    "first": [part.flatten()[:8].tolist() for part in quantized.parts],
                }
    return found


def main() -> None:
    """Write the golden files."""
    if "--write" not in sys.argv:
        sys.exit("say --write: the golden values are to change only where integers or shards are meant to change")
    data = Path(os.environ.get("NESTQUANT_TEST_DATA", FOLDER.parents[2] / "shared" / "data"))
    made = {}
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            made[name] = job(name, Path(folder))
    (FOLDER / "jobs.json").write_text(json.dumps(made, indent=1) + "\n")
    (FOLDER / "layers.json").write_text(json.dumps(layers(data), indent=1) + "\n")


if __name__ == "__main__":
    main()
