"""A job that equalizes activations: the manifest says what, the version answers as the user's network does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import nestquant
from jobs.driver import run_job
from jobs.spec.file import parse_spec
from storage.device import Device, StoreSource
from storage.stores.uri import open_store
from workers import runtime
from workers.executor import InProcessExecutor
from workers.inputs import networks
from workers.inputs.checkpoint import random_state


def spec(folder: Path, **quantize: object) -> object:
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", x=images)
    document = {
        "name": "net",
        "model": {"library": "pytorchcv", "arch": "resnet20_cifar10", "random_seed": 1},
        "quantize": {"bits": [8, 4], "activations": {"bits": 8}, **quantize},
        "calibration": {"data": str(folder / "images.npz"), "samples": 16, "batch_size": 8},
        "store": {"uri": str(folder / "store")},
    }
    return parse_spec(document, where="net")


@pytest.mark.parametrize("equalize", ["auto", "none"])
def test_a_version_answers_as_the_network_it_was_made_of(tmp_path: Path, equalize: str) -> None:
    run_job(spec(tmp_path, equalize=equalize), InProcessExecutor())  # type: ignore[arg-type]
    device = Device(tmp_path / "device", StoreSource(open_store(str(tmp_path / "store"))), unsigned=True)
    device.pull("net")
    device.upgrade("net")
    manifest = device.manifest("net")
    sites = manifest.recipe.get("equalized", [])
    # The first layer of each of nine blocks is read by the second alone; the others' outputs go into sums.
    assert len(sites) == (9 if equalize == "auto" else 0)
    assert all(site["power"] == 0.2 for site in sites)
    network = networks.build("pytorchcv", "resnet20_cifar10", {}).eval()
    network.load_state_dict(random_state("pytorchcv", "resnet20_cifar10", {}, 1))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nested = runtime.load(manifest, device.blob_path, level=1).network
    with torch.inference_mode():
        expected, answer = network(images), nested(images)
    assert float((answer - expected).norm() / expected.norm()) < 0.05


def test_a_network_in_memory_is_equalized_and_the_users_own_is_not_changed() -> None:
    network = networks.build("pytorchcv", "resnet20_cifar10", {}).eval()
    network.load_state_dict(random_state("pytorchcv", "resnet20_cifar10", {}, 1))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nested = nestquant.quantize(network, calibration=images, activations=8)
    plain = nestquant.quantize(network, calibration=images, activations=8, equalize="none")
    assert len(nested.manifest.recipe["equalized"]) == 9
    assert "equalized" not in plain.manifest.recipe
    assert nested.manifest.model.source_digest == plain.manifest.model.source_digest
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
