"""The whole way: spec to store to device, in this process and on a real Ray, the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from jobs.driver import run_job
from jobs.errors import PlanError
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from nestquant.engines.images import Preprocessing
from storage.device import Device, StoreSource
from storage.errors import NotFound
from storage.registry import Registry
from storage.stores.uri import open_store
from workers import runtime
from workers.errors import DataError
from workers.executor import InProcessExecutor
from workers.inputs.checkpoint import load_network
from workers.inputs.images import open_images
from workers.on_ray.executor import RayExecutor, RaySettings
from workers.tasks import TensorSource

Document = Callable[..., dict[str, Any]]
A = TypeVar("A")
R = TypeVar("R")


def local(document: dict[str, Any]) -> JobResult:
    return run_job(parse_spec(document, where="test"), InProcessExecutor())


def keys(uri: str, prefix: str) -> dict[str, bytes]:
    store = open_store(uri)
    return {info.key: store.get(info.key) for info in store.list(prefix)}


@pytest.fixture(scope="module")
def published(
    tiny_checkpoint: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobResult, str]:
    """One job in this process; other tests compare with it."""
    uri = str(tmp_path_factory.mktemp("published") / "store")
    return local(whole_document(tiny_checkpoint, tiny_images, uri)), uri


def whole_document(checkpoint: Path, images: Path, uri: str) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {
            "library": "timm",
            "arch": "test_resnet",
            "kwargs": {"num_classes": 10, "in_chans": 3},
            "checkpoint": str(checkpoint),
        },
        "quantize": {
            "recipe": "paper",
            "bits": [8, 6, 4],
            "activations": {"observer": "mse"},
            "overrides": {"fc": {"bits": [8]}},
        },
        "preprocess": {"size": 32},
        "calibration": {"data": str(images), "samples": 24, "batch_size": 8},
        "evaluate": {"data": str(images), "accept_chance": True},
        "store": {"uri": uri, "shard_bytes": 16384},
    }


def test_a_ray_job_writes_the_same_bytes_as_this_process(
    published: tuple[JobResult, str], tiny_checkpoint: Path, tiny_images: Path, tmp_path: Path, ray_cluster: None
) -> None:
    result, uri = published
    document = whole_document(tiny_checkpoint, tiny_images, str(tmp_path / "ray"))
    document["cluster"] = {"task_weights": 20_000, "max_in_flight": 3}
    with RayExecutor(RaySettings(max_in_flight=3)) as executor:
        on_ray = run_job(parse_spec(document, where="test"), executor)
    assert on_ray.digest == result.digest
    assert on_ray.work.units > 5
    for prefix in ("blobs/", "models/tiny/versions/00000001.json", "models/tiny/tags/"):
        assert keys(str(tmp_path / "ray"), prefix) == keys(uri, prefix)


class Shuffled(InProcessExecutor):
    """Does its items in an order of its own, as a cluster might."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = np.random.default_rng(seed)

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        order = [int(index) for index in self.random.permutation(len(items))]
        for at, result in super().map(function, [items[index] for index in order]):
            yield order[at], result


def test_a_job_says_how_it_read_the_labels(published: tuple[JobResult, str], tiny_images: Path) -> None:
    labels = np.load(tiny_images)["y"]
    assert (labels.min(), labels.max(), len(set(labels.tolist()))) == (0, 9, 10)
    assert published[0].notes[0] == "evaluate.data: 10 classes by the array 'y', 0 to 9"


def test_a_set_with_one_label_costs_no_work(tiny_document: Document, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.full(4, 3))
    with pytest.raises(DataError, match="has one label alone, 3"):
        local(tiny_document(evaluate__data=str(tmp_path / "one.npz")))
    assert not (tmp_path / "store" / "jobs").exists()


@pytest.mark.parametrize("task_weights", [1, 30_000, 100_000_000])
def test_neither_the_size_nor_the_order_of_tasks_changes_a_byte(
    published: tuple[JobResult, str], tiny_checkpoint: Path, tiny_images: Path, tmp_path: Path, task_weights: int
) -> None:
    document = whole_document(tiny_checkpoint, tiny_images, str(tmp_path / "other"))
    document["cluster"] = {"task_weights": task_weights}
    del document["evaluate"]
    result = run_job(parse_spec(document, where="test"), Shuffled(task_weights))
    assert result.digest == published[0].digest


def test_a_second_run_does_nothing_again(
    published: tuple[JobResult, str], tiny_checkpoint: Path, tiny_images: Path
) -> None:
    result, uri = published
    before = keys(uri, "blobs/")
    again = local(whole_document(tiny_checkpoint, tiny_images, uri))
    assert (again.version, again.digest, again.created) == (result.version, result.digest, False)
    assert again.work.reused == again.work.units == result.work.units
    assert keys(uri, "blobs/") == before


def test_the_report_counts_what_the_store_holds(published: tuple[JobResult, str]) -> None:
    result, uri = published
    manifest = Registry(open_store(uri)).resolve("tiny").manifest
    assert result.sizes.level_bytes == tuple(
        sum(group.levels[level].size_bytes for group in manifest.groups if level < len(group.levels))
        for level in range(3)
    )
    assert result.pull.level_bytes[0] == result.sizes.base_bytes + result.sizes.level_bytes[0]
    assert result.pull.level_bytes[1:] == result.sizes.level_bytes[1:]
    assert result.sizes.weights == sum(int(np.prod(layer.shape)) for layer in manifest.layers)
    modes = [(one.mode, one.activations) for one in result.measured]
    assert modes == [
        ("float", False),
        ("part-bit", False),
        ("level 1", False),
        ("full-bit", False),
        ("part-bit", True),
        ("level 1", True),
        ("full-bit", True),
    ]
    assert {one.total for one in result.measured} == {40}
    resident = [one.resident_bytes for one in result.measured[1:4]]
    assert resident == sorted(resident)  # type: ignore[type-var]


def test_more_noise_at_fewer_bits(published: tuple[JobResult, str]) -> None:
    result, _ = published
    for layer in result.layers:
        levels = [value for value in layer.sqnr_db if value is not None]
        assert levels == sorted(levels), layer.name
    plain = next(layer for layer in result.layers if layer.name == "conv1.0")
    assert plain.sqnr_db[-1] is not None
    assert plain.sqnr_db[-1] > 30


@pytest.fixture(scope="module")
def device(published: tuple[JobResult, str], tmp_path_factory: pytest.TempPathFactory) -> Device:
    _, uri = published
    device = Device(tmp_path_factory.mktemp("device"), StoreSource(open_store(uri)), unsigned=True)
    device.pull("tiny")
    device.upgrade("tiny")
    return device


def outputs(network: torch.nn.Module, images: Path) -> torch.Tensor:
    manifest_size = Preprocessing(32, None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch, _ = next(open_images(images).batches(manifest_size, batch_size=8))
    with torch.inference_mode():
        return network(batch)


def test_the_network_on_the_device_is_the_one_that_was_quantized(
    device: Device, tiny_checkpoint: Path, tiny_images: Path
) -> None:
    """Independent of runtime and shards: quantize every layer of the float network here and compare outputs."""
    from nestquant.config import NestConfig
    from nestquant.quantized_weight import quantize_weight

    manifest = device.manifest("tiny")
    model = runtime.load(manifest, device.blob_path)
    for level in (0, 1, 2, 1, 0):
        model.to_level(level)
        reference = load_network(
            "timm", "test_resnet", {"num_classes": 10, "in_chans": 3}, TensorSource(None, str(tiny_checkpoint))
        )
        with torch.no_grad():
            for layer in manifest.layers:
                module = reference.get_submodule(layer.name)
                quantized = quantize_weight(module.weight, NestConfig(bits=layer.bits))
                module.weight.copy_(quantized.dequantize(min(level, len(layer.bits) - 1)))
        assert torch.equal(outputs(model.network, tiny_images), outputs(reference, tiny_images)), level


def test_packed_and_expanded_run_the_same(device: Device, tiny_images: Path) -> None:
    manifest = device.manifest("tiny")
    packed = runtime.load(manifest, device.blob_path, level=2)
    expanded = runtime.load(manifest, device.blob_path, level=2, residency="expanded")
    assert torch.equal(outputs(packed.network, tiny_images), outputs(expanded.network, tiny_images))
    assert packed.resident_bytes() < expanded.resident_bytes() / 2


def test_paging_in_and_out_moves_exactly_the_low_bytes(device: Device) -> None:
    model = runtime.load(device.manifest("tiny"), device.blob_path)
    sizes = [model.resident_bytes()]
    for level in (1, 2):
        model.upgrade(level)
        sizes.append(model.resident_bytes())
    nested = [layer for layer in model.manifest.layers if len(layer.bits) == 3]
    low = sum(-(-int(np.prod(layer.shape)) * 3 // 8) for layer in nested)  # 6 over 4 and 8 over 6: 3 bits each
    assert [sizes[1] - sizes[0], sizes[2] - sizes[1]] == [low, low]
    model.downgrade(0)
    assert model.resident_bytes() == sizes[0]


def test_a_gate_that_is_missed_stores_but_does_not_tag(tiny_document: Document) -> None:
    document = tiny_document(evaluate__min_part_top1=99.9)
    result = local(document)
    assert result.gate is not None
    assert result.gate.startswith("part-bit top-1 is ")
    registry = Registry(open_store(document["store"]["uri"]))
    assert registry.versions("tiny") == [1]
    with pytest.raises(NotFound):
        registry.resolve("tiny", "latest")


def test_bad_images_are_named_and_the_rest_counts(tiny_document: Document, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        Image.fromarray(np.full((32, 32, 3), 40 * index, np.uint8)).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes(b"not an image")
    document = tiny_document(calibration__data=str(folder), calibration__samples=6)
    del document["evaluate"]
    result = local(document)
    assert [name for name, _ in result.skipped_images] == ["3.png"]
    record = Registry(open_store(document["store"]["uri"])).resolve("tiny").manifest.calibration
    assert record is not None
    assert (record.samples, record.skipped) == (5, 1)


def test_nothing_is_written_when_an_input_is_wrong(tiny_document: Document, tmp_path: Path) -> None:
    for changes, error in (
        ({"evaluate__data": str(tmp_path / "nowhere")}, Exception),
        ({"quantize__ignore": ["*"]}, PlanError),
    ):
        document = tiny_document(**changes)
        with pytest.raises(error):
            local(document)
        assert list(open_store(document["store"]["uri"]).list()) == []


def test_symmetric_sigma_needs_no_images(tiny_document: Document) -> None:
    document = tiny_document(quantize={"bits": [8, 5], "scheme": "symmetric", "activations": {"observer": "sigma"}})
    del document["calibration"], document["evaluate"]
    local(document)
    manifest = Registry(open_store(document["store"]["uri"])).resolve("tiny").manifest
    assert {layer.scheme for layer in manifest.layers} == {"symmetric"}
    assert manifest.layers[0].activation is None
    assert all(layer.activation is not None for layer in manifest.layers[1:])


def test_calibration_images_must_be_readable(tiny_document: Document, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no")
    document = tiny_document(calibration__data=str(folder))
    with pytest.raises(DataError, match=r"bad: none of 1 images can be used; the first, a\.png: .+\.$"):
        local(document)
