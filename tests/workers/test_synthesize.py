"""Synthetic image sets on workers: the same bytes in any order, found again, and a network fitted to them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestquant.engines.images import Preprocessing
from storage.registry import Registry
from storage.stores.uri import open_store
from workers.errors import DataError
from workers.inputs.checkpoint import load_network, random_state, save_state
from workers.inputs.files import fetch, stored_file
from workers.inputs.images import open_images
from workers.synthesize import JoinTask, SynthesizeTask, SyntheticRecord, find_synthetic, join, synthesize
from workers.tasks import NetworkRef, TaskContext, TensorSource

KWARGS = {"num_classes": 10, "in_chans": 3}
NETWORK: dict[str, Any] = {"library": "timm", "arch": "test_resnet", "kwargs": KWARGS}
PREPROCESSING = {"size": 32, "resize": None, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
JOB = "sha256:" + "a" * 64


def context(store: Path, checkpoint: Path, **changes: Any) -> TaskContext:
    network = NetworkRef(**NETWORK, source=TensorSource(None, str(checkpoint)), preprocessing=PREPROCESSING | changes)
    return TaskContext(store_uri=store.as_uri(), job=JOB, network=network)


def chunk(where: TaskContext, index: int, samples: int = 4) -> SynthesizeTask:
    return SynthesizeTask(context=where, samples=samples, chunk=index)


def made(where: TaskContext, order: list[int]) -> SyntheticRecord:
    for index in order:
        assert synthesize(chunk(where, index)) == 4
    return join(JoinTask(context=where, chunks=len(order)))


def contents(where: TaskContext) -> dict[str, bytes]:
    store = open_store(where.store_uri)
    return {info.key: store.get(info.key) for info in store.list()}


def test_any_order_of_the_chunks_gives_the_same_bytes(normed_checkpoint: Path, tmp_path: Path) -> None:
    one, other = (context(tmp_path / name, normed_checkpoint) for name in ("one", "other"))
    record = made(one, [0, 1, 2])
    synthesize(chunk(other, 1))  # a task that runs twice
    assert made(other, [2, 1, 0]) == record
    assert contents(one) == contents(other)
    folder = f"jobs/{'a' * 64}/synthetic"
    assert sorted(contents(one)) == [
        f"{folder}/{name}" for name in ("images.npz", "network.safetensors", "record.json")
    ]
    assert (record.samples, record.norms) == (12, 15)

    images = fetch(stored_file(one.store_uri, record.images), tmp_path)
    assert record.digest == f"sha256:{hashlib.sha256(images.read_bytes()).hexdigest()}"
    inputs, _ = next(open_images(images).batches(Preprocessing.from_record(PREPROCESSING), batch_size=12))
    expected = (np.load(images)["x"].astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
    assert torch.equal(inputs, torch.from_numpy(expected).permute(0, 3, 1, 2))


def test_the_fitted_network_differs_in_its_statistics_alone(normed_checkpoint: Path, tmp_path: Path) -> None:
    where = context(tmp_path / "store", normed_checkpoint)
    record = made(where, [0])
    assert record.network is not None
    before = load_network(**NETWORK, source=TensorSource(None, str(normed_checkpoint)))
    after = load_network(**NETWORK, source=TensorSource(where.store_uri, record.network))
    images = fetch(stored_file(where.store_uri, record.images), tmp_path)
    inputs, _ = next(open_images(images).batches(Preprocessing.from_record(PREPROCESSING), batch_size=4))
    changed = set()
    for name, tensor in before.state_dict().items():
        if not torch.equal(tensor, after.state_dict()[name]):
            changed.add(name)
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var"}
    assert len(changed) == 2 * record.norms
    seen: dict[str, torch.Tensor] = {}
    after.get_submodule("layer4.0.bn1").register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.inference_mode():
        after(inputs)
    last = after.get_submodule("layer4.0.bn1")
    assert torch.allclose(seen["x"].mean(dim=(0, 2, 3)), last.running_mean, atol=1e-5)  # type: ignore[arg-type]


def test_a_network_that_was_never_trained_stays_as_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    record = made(context(tmp_path / "store", tiny_checkpoint), [0])
    assert (record.network, record.norms) == (None, 0)


def test_what_was_made_is_found_while_all_of_it_is_there(normed_checkpoint: Path, tmp_path: Path) -> None:
    where = context(tmp_path / "store", normed_checkpoint)
    registry = Registry(open_store(where.store_uri))
    assert find_synthetic(registry, JOB) is None
    record = made(where, [0])
    assert find_synthetic(registry, JOB) == record
    registry.store.delete(record.images)
    assert find_synthetic(registry, JOB) is None


def test_images_of_two_channels_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = chunk(context(tmp_path / "store", tiny_checkpoint, mean=[0.5] * 2, std=[0.5] * 2), 0)
    with pytest.raises(DataError, match="2 channels; expected a network of 1 or 3"):
        synthesize(task)


@pytest.fixture(scope="module")
def normed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network with statistics as if it had been trained."""
    state = random_state("timm", "test_resnet", KWARGS, seed=7)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return save_state(state, tmp_path_factory.mktemp("normed") / "normed.safetensors")
