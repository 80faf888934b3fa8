"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

pytest_plugins = ["tests.servers.plugin"]

ROOT = Path(__file__).resolve().parent.parent
TINY = {"library": "timm", "arch": "test_resnet", "kwargs": {"num_classes": 10, "in_chans": 3}}


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with real weights, images and golden vectors; without it a test skips, and fails where CI=true."""
    folder = Path(os.environ.get("NESTQUANT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "weights").is_dir():
        message = f"no test data at {folder}: set NESTQUANT_TEST_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session: starting one takes 15 s on two cores."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small timm ResNet (373 k weights), as safetensors."""
    from workers.inputs.checkpoint import random_state, save_state

    state = random_state(TINY["library"], TINY["arch"], dict(TINY["kwargs"]), seed=7)
    return save_state(state, tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty 32x32 colour images of noise with labels, as npz."""
    random = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("images") / "noise.npz"
    np.savez(path, x=random.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), y=random.integers(0, 10, 40))
    return path


@pytest.fixture
def tiny_document(tiny_checkpoint: Path, tiny_images: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that builds a whole spec for the tiny model; dotted keys change it."""
    from jobs.spec.file import with_changes

    def build(**changes: Any) -> dict[str, Any]:
        document: dict[str, Any] = {
            "name": "tiny",
            "model": {**TINY, "checkpoint": str(tiny_checkpoint)},
            "quantize": {"bits": [8, 4], "activations": {"observer": "mse"}},
            "preprocess": {"size": 32},
            "calibration": {"data": str(tiny_images), "samples": 24, "batch_size": 8},
            "evaluate": {"data": str(tiny_images), "accept_chance": True},
            "store": {"uri": str(tmp_path / "store"), "shard_bytes": 65536},
        }
        return with_changes(document, {key.replace("__", "."): value for key, value in changes.items()})

    return build
