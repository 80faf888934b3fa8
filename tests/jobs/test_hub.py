"""A version as a folder for the HF hub: what its tools read is what a device runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.serialization import load_torch_model
from safetensors.torch import save_file

from jobs.driver import run_job
from jobs.hub import HubFolderError, export_hf
from jobs.spec.file import parse_spec
from storage.device import Device, StoreSource
from storage.stores.local import LocalStore
from tests.jobs.conftest import Run
from tests.tiny import MODEL as TINY
from workers import runtime
from workers.executor import InProcessExecutor
from workers.inputs import networks


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """Three levels, by the recipe that changes biases, too."""
    uri = tmp_path_factory.mktemp("hub") / "store"
    document = {
        "name": "tiny",
        "model": {**TINY, "checkpoint": str(tiny_checkpoint)},
        "quantize": {"recipe": "calibrated", "bits": [8, 6, 4]},
        "calibration": {"data": str(tiny_images), "samples": 16},
        "preprocess": {"size": 32},
        "store": {"uri": str(uri)},
    }
    run_job(parse_spec(document, where="test"), InProcessExecutor())
    return LocalStore(uri)


def answers(network: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return network(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)))


def test_timm_builds_from_the_folder_what_a_device_runs(store: LocalStore, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    manifest = export_hf(store, "tiny", "latest", folder)
    assert any(layer.biases for layer in manifest.layers)
    device = Device(tmp_path / "cache", StoreSource(store), unsigned=True)
    device.pull("tiny", level=2)
    model = runtime.load(manifest, device.blob_path)
    for level, place in enumerate(("part-bit", "level-1", ".")):
        model.to_level(level)
        built = timm.create_model(f"local-dir:{folder / place}", pretrained=True).eval()
        torch.testing.assert_close(answers(built), answers(model.network), atol=1e-4, rtol=1e-4, msg=place)
        assert built.pretrained_cfg["input_size"] == (3, 32, 32)
        again = timm.create_model("test_resnet", **TINY.get("kwargs", {})).eval()  # type: ignore[arg-type]
        load_torch_model(again, folder / place / "model.safetensors", strict=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tiny"]


def test_the_card_is_one_that_the_hub_reads(store: LocalStore, tmp_path: Path) -> None:
    export_hf(store, "tiny", "1", tmp_path / "tiny")
    card = ModelCard.load(tmp_path / "tiny" / "README.md")
    assert card.data.to_dict()["library_name"] == "timm"
    assert card.data.to_dict()["pipeline_tag"] == "image-classification"
    assert "# tiny version 1" in card.text
    rows = [line for line in card.text.splitlines() if line.startswith("| ") and "safetensors" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| part-bit", "| level 1", "| full-bit"]
    assert [row.split("`, ")[1].split(" bits")[0] for row in rows] == ["4, 5", "6", "8"]
    assert rows[0].endswith("| not measured | not measured |")
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["architecture"] == "test_resnet"


def test_the_folder_is_a_store_too(store: LocalStore, tmp_path: Path) -> None:
    export_hf(store, "tiny", "latest", tmp_path / "tiny")
    source = StoreSource(LocalStore(tmp_path / "tiny" / "nestquant"))
    device = Device(tmp_path / "cache", source, unsigned=True)
    assert device.pull("tiny").version == 1
    assert device.upgrade("tiny").level == 2
    assert device.verify("tiny").whole


def test_a_folder_that_is_not_empty_stays_as_it_is(nestquant: Run, store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine").write_text("mine")
    with pytest.raises(HubFolderError, match="is there, and not empty; choose another folder"):
        export_hf(store, "tiny", "latest", tmp_path / "tiny")
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["mine"]
    code, out, _ = nestquant("export-hf", "tiny", tmp_path / "new", "--store", store.root, "--json")
    assert code == 0
    assert {"README.md", "config.json", "model.safetensors", "part-bit/model.safetensors"} <= set(
        json.loads(out)["files"]
    )
    assert nestquant("export-hf", "tiny", tmp_path / "new", "--store", store.root)[0] == 2


def test_a_network_of_pytorchcv_says_how_it_is_built(tmp_path: Path) -> None:
    network = networks.build("pytorchcv", "resnet20_cifar10")
    checkpoint = tmp_path / "net.safetensors"
    save_file({key: one.contiguous() for key, one in network.state_dict().items()}, checkpoint)
    document = {
        "name": "net",
        "model": {"library": "pytorchcv", "arch": "resnet20_cifar10", "checkpoint": str(checkpoint)},
        "quantize": {"recipe": "paper", "activations": None},
        "store": {"uri": str(tmp_path / "store")},
    }
    run_job(parse_spec(document, where="test"), InProcessExecutor())
    export_hf(LocalStore(tmp_path / "store"), "net", "latest", tmp_path / "net")
    config = json.loads((tmp_path / "net" / "part-bit" / "config.json").read_text())
    assert (config["library_name"], config["architecture"]) == ("pytorchcv", "resnet20_cifar10")
    device = Device(tmp_path / "cache", StoreSource(LocalStore(tmp_path / "store")), unsigned=True)
    device.pull("net")
    model = runtime.load(device.manifest("net"), device.blob_path)
    load_torch_model(network, tmp_path / "net" / "part-bit" / "model.safetensors", strict=True)
    torch.testing.assert_close(answers(network), answers(model.network), atol=1e-4, rtol=1e-4)
