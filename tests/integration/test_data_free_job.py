"""The recipe ``data_free`` as a job: the same bytes here and on Ray, images made once, a version true to its source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.driver import run_job
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from storage.device import Device, StoreSource
from storage.registry import Registry
from storage.stores.uri import open_store
from workers import runtime
from workers.executor import InProcessExecutor
from workers.inputs.checkpoint import random_state, save_state
from workers.on_ray.executor import RayExecutor, RaySettings

Document = Callable[..., dict[str, Any]]


@pytest.fixture
def document(tiny_document: Document, tmp_path: Path) -> Document:
    """A job on the tiny network, with BatchNorm statistics as if it had been trained."""
    state = random_state("timm", "test_resnet", {"num_classes": 10, "in_chans": 3}, seed=7)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    checkpoint = save_state(state, tmp_path / "normed.safetensors")

    def build(**changes: Any) -> dict[str, Any]:
        quantize: dict[str, Any] = {"recipe": "data_free", "bits": [8, 4], "activations": {"observer": "mse"}}
        quantize["ignore"] = ["conv1.[36]", "layer[234]*"]  # four layers are left: a Ray task costs more than a layer
        return tiny_document(model__checkpoint=str(checkpoint), quantize=quantize, calibration=None, **changes)

    return build


def local(document: dict[str, Any]) -> JobResult:
    return run_job(parse_spec(document, where="test"), InProcessExecutor())


def contents(uri: str, prefix: str) -> dict[str, bytes]:
    store = open_store(uri)
    return {info.key: store.get(info.key) for info in store.list(prefix)}


def test_workers_change_no_byte_and_what_is_published_is_the_checkpoints_own(
    document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    monkeypatch.setattr("jobs.stages.synthesis.SAMPLES", 10)
    monkeypatch.setattr("jobs.stages.synthesis.CHUNK", 4)
    here = document()
    result = local(here)
    there = document(store__uri=str(tmp_path / "ray"))
    with RayExecutor(RaySettings(max_in_flight=3)) as executor:
        on_ray = run_job(parse_spec(there, where="test"), executor)
    uri = here["store"]["uri"]
    assert on_ray.digest == result.digest
    assert contents(there["store"]["uri"], "blobs/") == contents(uri, "blobs/")
    made = contents(uri, f"jobs/{result.job.removeprefix('sha256:')}/synthetic/")
    assert [key.rpartition("/")[2] for key in made] == ["images.npz", "network.safetensors", "record.json"]
    assert contents(there["store"]["uri"], f"jobs/{result.job.removeprefix('sha256:')}/synthetic/") == made

    registry = Registry(open_store(uri))
    manifest = registry.resolve("tiny").manifest
    assert manifest.calibration is not None
    assert (manifest.calibration.samples, manifest.calibration.observer) == (10, "mse")
    assert manifest.calibration.source_digest is not None
    assert [layer.name for layer in manifest.layers] == ["conv1.0", "layer1.0.conv1", "layer1.0.conv2", "fc"]
    assert manifest.recipe["recipe"] == "data_free"
    assert all(layer.biases for layer in manifest.layers)
    assert all(layer.activation is not None for layer in manifest.layers[1:])
    device = Device(tmp_path / "device", StoreSource(registry.store), unsigned=True)
    device.pull("tiny")
    network = runtime.load(manifest, device.blob_path).network
    source = random_state("timm", "test_resnet", {"num_classes": 10, "in_chans": 3}, seed=7)
    generator = torch.Generator().manual_seed(1)
    for name in (name for name in source if name.endswith("running_mean")):
        expected = 0.1 * torch.randn(source[name].shape, generator=generator)
        assert torch.equal(network.state_dict()[name], expected), name

    monkeypatch.setattr("jobs.stages.synthesis.synthesize", None)  # a second run makes no image again
    assert local(here).digest == result.digest
