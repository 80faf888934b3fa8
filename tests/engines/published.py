"""Small versions with an engine's graph, and what is needed to hold them against the torch runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from jobs.driver import run_job
from jobs.spec.job import JobSpec
from jobs.updates import publish_deltas
from storage.engine_layout import Layout, read_layout
from storage.manifest import Manifest
from storage.registry import Registry
from storage.stores.uri import open_store
from tests import tiny
from workers import runtime
from workers.executor import InProcessExecutor


def spec_of(folder: Path, **quantize: Any) -> dict[str, Any]:
    """Return the tiny job as a document, symmetric and exported; ``quantize`` on top."""
    document = tiny.job_document(
        checkpoint=str(tiny.write_checkpoint(folder / "weights.safetensors")),
        images=str(tiny.write_images(folder / "images.npz")),
        store=str(folder / "store"),
    )
    del document["evaluate"]
    document["quantize"] = {"recipe": "paper", "bits": [8, 4], "scheme": "symmetric", **quantize}
    document["export"] = {"engines": ["onnx"]}
    return document


def publish(document: dict[str, Any]) -> tuple[Registry, Manifest]:
    """Run the job; return its store and manifest."""
    result = run_job(JobSpec.model_validate(document), InProcessExecutor())
    registry = Registry(open_store(document["store"]["uri"]))
    return registry, registry.resolve(result.name, str(result.version)).manifest


def publish_with_deltas(folder: Path) -> tuple[Registry, Manifest]:
    """Publish the tiny job, the job after a change of its last layer, and that once more with deltas: version 3."""
    document = spec_of(folder)
    publish(document)
    state = load_file(folder / "weights.safetensors")
    state["fc.weight"][0] *= 1.01
    save_file(state, folder / "weights.safetensors")
    registry, _ = publish(document)
    publish_deltas(registry, registry.resolve("tiny", "2"), [registry.resolve("tiny", "1")])
    return registry, registry.resolve("tiny", "3").manifest


def layout_of(registry: Registry, manifest: Manifest) -> tuple[Layout, dict[str, Any]]:
    """Return the layout of a version's ONNX graph and its values."""
    engine = manifest.engine("onnx")
    assert engine is not None
    return read_layout(registry.get_blob(engine.layout), manifest)


def images(count: int, size: int = 32) -> np.ndarray:
    """Return inputs of noise, float32 ``[count, 3, size, size]``."""
    return np.random.default_rng(5).normal(0, 1, (count, 3, size, size)).astype(np.float32)


def torch_answers(registry: Registry, manifest: Manifest, inputs: np.ndarray, *, level: int, activations: bool) -> Any:
    """Return what the torch runtime answers at a level."""
    root = Path(registry.store.uri.removeprefix("file://"))
    model = runtime.load(
        manifest, lambda blob: root / "blobs" / "sha256" / blob.digest[7:9] / blob.digest[7:], level=level
    )
    model.quantize_activations(enabled=activations)
    with torch.inference_mode():
        return model.network(torch.from_numpy(inputs)).numpy()
