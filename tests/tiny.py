"""The smallest whole job of the suite: a timm ResNet of 373 k random weights and forty images of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MODEL: dict[str, Any] = {"library": "timm", "arch": "test_resnet", "kwargs": {"num_classes": 10, "in_chans": 3}}


def write_checkpoint(path: Path) -> Path:
    """Write the model's random weights as safetensors."""
    from workers.inputs.checkpoint import random_state, save_state

    return save_state(random_state(MODEL["library"], MODEL["arch"], dict(MODEL["kwargs"]), seed=7), path)


def write_images(path: Path) -> Path:
    """Write forty 32x32 colour images of noise with labels, as npz."""
    random = np.random.default_rng(3)
    np.savez(path, x=random.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), y=random.integers(0, 10, 40))
    return path


def job_document(*, checkpoint: str, images: str, store: str) -> dict[str, Any]:
    """Return a whole spec: 8|4 bits, calibrated activations, measured on the images."""
    return {
        "name": "tiny",
        "model": {**MODEL, "checkpoint": checkpoint},
        "quantize": {"recipe": "paper", "bits": [8, 4], "activations": {"observer": "mse"}},
        "preprocess": {"size": 32},
        "calibration": {"data": images, "samples": 24, "batch_size": 8},
        "evaluate": {"data": images, "accept_chance": True},
        "store": {"uri": store, "shard_bytes": 65536},
    }
