"""Weights from files: what is accepted, unwrapped, and refused with a list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from storage.errors import NotFound
from storage.stores.s3 import S3Store
from storage.stores.uri import open_store
from tests.servers.s3_server import S3Server
from workers.errors import CheckpointError, ModelError
from workers.inputs import networks
from workers.inputs.checkpoint import load_network, random_state, save_state, to_safetensors
from workers.inputs.files import fetch, stored_file
from workers.inputs.fit import Architecture, check_fit, check_shapes
from workers.inputs.tensors import TensorReader
from workers.tasks import TensorSource

ARCH, KWARGS = "test_resnet", {"num_classes": 10}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state("timm", ARCH, KWARGS, seed=1)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_pickled_state_dict_is_unwrapped(
    state: dict[str, torch.Tensor], wrap: Callable[[object], object], prefix: str, tmp_path: Path
) -> None:
    torch.save(wrap({prefix + name: tensor for name, tensor in state.items()}), tmp_path / "weights.pth")
    path = to_safetensors(tmp_path / "weights.pth", tmp_path, tuple(state)).path
    network = load_network("timm", ARCH, KWARGS, TensorSource(None, str(path)))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_same_state_gives_the_same_bytes(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    first = save_state(state, tmp_path / "a.safetensors").read_bytes()
    assert save_state(dict(reversed(state.items())), tmp_path / "b.safetensors").read_bytes() == first


def test_what_shares_memory_is_written_under_each_of_its_names(tmp_path: Path) -> None:
    memory = torch.arange(12.0)
    tied = {"a": memory, "again": memory, "rows": memory[4:8], "turned": memory.reshape(3, 4).T}
    reader = TensorReader(TensorSource(None, str(save_state(tied, tmp_path / "tied.safetensors"))))
    assert {name: reader.read(name).tolist() for name in reader.tensors} == {
        name: tensor.tolist() for name, tensor in tied.items()
    }


def test_missing_unexpected_and_wrong_are_listed(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    broken = dict(state)
    broken["conv1.0.weigth"] = broken.pop("conv1.0.weight")
    broken["fc.weight"] = torch.zeros(11, broken["fc.weight"].shape[1])
    reader = TensorReader(TensorSource(None, str(save_state(broken, tmp_path / "broken.safetensors"))))
    with pytest.raises(CheckpointError) as caught:
        check_fit(networks.build("timm", ARCH, KWARGS, meta=True), reader)
    message = str(caught.value)
    assert "1 keys missing (conv1.0.weight)" in message
    assert "1 keys unexpected (conv1.0.weigth)" in message
    assert "1 shapes differ ('fc.weight': (11, " in message
    assert "Did you mean 'conv1.0.weigth'?" in message


@pytest.mark.parametrize(
    ("library", "arch", "built", "asked", "said"),
    [
        (
            "timm",
            "test_resnet",
            {"num_classes": 100},
            {},
            "the checkpoint has 100 classes; add kwargs: {num_classes: 100}.",
        ),
        (
            "timm",
            "test_resnet",
            {"num_classes": 7, "in_chans": 1},
            {"num_classes": 5},
            "the checkpoint takes 1 channels and has 7 classes; set kwargs: {in_chans: 1, num_classes: 7}.",
        ),
        (
            "pytorchcv",
            "resnet20_cifar10",
            {"num_classes": 100},
            {},
            "the checkpoint has 100 classes; add kwargs: {num_classes: 100}.",
        ),
        (
            "pytorchcv",
            "fdmobilenet_wd4",
            {"in_channels": 1, "num_classes": 3},
            {},
            "the checkpoint takes 1 channels and has 3 classes; add kwargs: {in_channels: 1, num_classes: 3}.",
        ),
        (
            "timm",
            "test_vit",
            {"img_size": 96, "num_classes": 4},
            {},
            "the checkpoint is for images of 96 pixels and has 4 classes; add kwargs: {img_size: 96, num_classes: 4}.",
        ),
    ],
)
def test_weights_of_another_size_say_which_argument_fits(
    tmp_path: Path, *, library: str, arch: str, built: dict[str, int], asked: dict[str, int], said: str
) -> None:
    path = save_state(random_state(library, arch, built, seed=0), tmp_path / "w.safetensors")
    reader = TensorReader(TensorSource(None, str(path), name="mine.pth"))
    with pytest.raises(CheckpointError) as caught:
        check_shapes(
            networks.build(library, arch, asked, meta=True),
            {name: info.shape for name, info in reader.tensors.items()},
            name="mine.pth",
            architecture=Architecture(library, arch, asked),
        )
    assert str(caught.value) == f"mine.pth does not fit the network: {said}"
    check_fit(networks.build(library, arch, built, meta=True), reader)


def test_weights_that_no_argument_makes_fit_are_listed(tmp_path: Path) -> None:
    path = save_state(random_state("timm", "test_resnet", {}, seed=0), tmp_path / "w.safetensors")
    network = networks.build("timm", "test_vit", meta=True)
    with pytest.raises(CheckpointError, match=r"does not fit the network: \d+ keys missing .* Check model\.arch"):
        check_fit(network, TensorReader(TensorSource(None, str(path))))


def test_a_missing_file_and_a_bucket_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No file at /nowhere: expected a local path or an s3:// URI"):
        fetch("/nowhere", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"~nobody-here/x cannot be read as a checkpoint: RuntimeError: Could not"
    ):
        fetch("~nobody-here/x", tmp_path)
    with pytest.raises(CheckpointError, match="names a bucket; expected s3://bucket/path/to/file"):
        fetch("s3://bucket", tmp_path)


def test_an_object_of_any_store_is_fetched(tmp_path: Path) -> None:
    for uri in ("memory://fetched", (tmp_path / "store").as_uri()):
        open_store(uri).put("jobs/a/images.npz", b"content", mode="create")
        path = fetch(stored_file(uri, "jobs/a/images.npz"), tmp_path)
        assert (path.name, path.read_bytes()) == ("images.npz", b"content")
    # Two stores may call different files the same.
    one, other = (stored_file(uri, "jobs/a/images.npz") for uri in ("memory://fetched", "memory://fetched2"))
    open_store("memory://fetched2").put("jobs/a/images.npz", b"else", mode="create")
    assert [fetch(uri, tmp_path).read_bytes() for uri in (one, other, one)] == [b"content", b"else", b"content"]
    odd = tmp_path / "a#b.npz"
    odd.write_bytes(b"plain")
    assert fetch(f"file://{odd}", tmp_path) == odd.resolve()


@pytest.mark.parametrize(
    ("library", "arch", "hint"),
    [("timm", "resnet81", "resnet18"), ("pytorchcv", "resnet20_cifar01", "resnet20_cifar10")],
)
def test_an_unknown_architecture_names_a_near_one(library: str, arch: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        networks.build(library, arch)
    assert hint in str(caught.value)


def test_wrong_arguments_are_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        networks.build("timm", ARCH, {"num_clases": 10})
    assert len(str(caught.value).splitlines()) == 1
    assert "num_clases" in str(caught.value)


def test_pretrained_without_a_network_says_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "/nonexistent")
    with pytest.raises(ModelError, match=r"with its pretrained weights.*give model\.checkpoint instead"):
        networks.build("timm", "test_resnet.r160_in1k", pretrained=True)


def test_an_s3_object_is_downloaded_once_whatever_its_owner_called_it(moto_s3: S3Server, tmp_path: Path) -> None:
    place, _, query = moto_s3.uri().partition("?")
    folder = open_store(f"{place}?{query}")
    assert isinstance(folder, S3Store)
    for content in (b"first", b"second"):
        folder.client.put_object(Bucket=folder.bucket, Key=f"{folder.prefix}My Model.PTH", Body=content)
        path = fetch(f"{place}/My%20Model.PTH?{query}", tmp_path / "job")
        assert (path.name, path.read_bytes()) == ("My Model.PTH", b"first")  # what a job does sees the same bytes
    with pytest.raises(NotFound, match=r"none\.pth: no such object"):
        fetch(f"{place}/none.pth?{query}", tmp_path / "job")
