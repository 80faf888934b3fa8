"""Mixed bits as a job: the same bytes here and on Ray, layers measured once, the spec's own overrides respected."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.driver import run_job
from jobs.errors import PlanError
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from nestquant.config import NestConfig
from nestquant.engines.images import Preprocessing
from nestquant.quantized_weight import quantize_weight
from storage.registry import Registry
from storage.stores.uri import open_store
from workers import sensitivity
from workers.executor import InProcessExecutor
from workers.inputs.checkpoint import load_network
from workers.inputs.images import open_images, spread
from workers.on_ray.executor import RayExecutor, RaySettings
from workers.sensitivity import SensitivityRecord
from workers.tasks import TensorSource

Document = Callable[..., dict[str, Any]]
QUANTIZE = {
    "recipe": "calibrated",
    "bits": [8, 4],
    "ignore": ["layer[134]*"],  # solving layers takes most of the time
    "overrides": {"fc": {"bits": [8, 7]}},
    "mixed": {"mean_bits": 4.0, "choices": [3, 5], "samples": 8},
}


def local(document: dict[str, Any]) -> JobResult:
    return run_job(parse_spec(document, where="test"), InProcessExecutor())


def keys(uri: str, prefix: str) -> dict[str, bytes]:
    store = open_store(uri)
    return {info.key: store.get(info.key) for info in store.list(prefix)}


def test_workers_change_no_byte_and_the_mean_is_kept(
    tiny_document: Document, tmp_path: Path, ray_cluster: None
) -> None:
    document = tiny_document(quantize=QUANTIZE)
    result = local(document)
    other = tiny_document(quantize=QUANTIZE, store__uri=str(tmp_path / "ray"), cluster={"task_weights": 20_000})
    with RayExecutor(RaySettings(max_in_flight=3)) as executor:
        on_ray = run_job(parse_spec(other, where="test"), executor)
    assert on_ray.digest == result.digest
    assert (on_ray.mixed, on_ray.layers) == (result.mixed, result.layers)
    job = f"jobs/{result.job.removeprefix('sha256:')}"
    for prefix in ("blobs/", f"{job}/sensitivity/", f"{job}/mixed.json"):
        found = keys(other["store"]["uri"], prefix)
        assert found == keys(document["store"]["uri"], prefix)
        assert found

    assert result.mixed is not None
    layers = Registry(open_store(document["store"]["uri"])).resolve("tiny").manifest.layers
    assert {layer.name: layer.bits[-1] for layer in layers} == result.mixed.high_bits
    assert {layer.bits for layer in layers if layer.name != "fc"} == {(8, 3), (8, 5)}
    assert next(layer.bits for layer in layers if layer.name == "fc") == (8, 7)
    weights = {layer.name: math.prod(layer.shape) for layer in layers}
    total = sum(weights.values())
    bits = sum(weights[layer.name] * layer.bits[-1] for layer in layers)
    assert bits <= 4 * total
    assert result.mixed.mean_bits == bits / total
    # The estimate is of shards that hold one layer each: it stays above what the store holds, by little.
    assert result.sizes.level_bytes[0] <= result.mixed.level_bytes <= 1.1 * result.sizes.level_bytes[0]


def test_what_was_measured_is_not_measured_again(tiny_document: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tiny_document(quantize={**QUANTIZE, "recipe": "paper"})
    measured: list[str] = []

    def killed(task: sensitivity.SensitivityTask) -> SensitivityRecord:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(task.layer.layer)
        return sensitivity.measure_layer(task)

    monkeypatch.setattr("jobs.stages.sensitivity.measure_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        local(document)
    monkeypatch.setattr("jobs.stages.sensitivity.measure_layer", sensitivity.measure_layer)
    forwards: list[str] = []
    quantized = sensitivity.quantize_weight

    def noted(weight: torch.Tensor, config: NestConfig) -> Any:
        forwards.append(str(tuple(weight.shape)))
        return quantized(weight, config)

    monkeypatch.setattr("workers.sensitivity.quantize_weight", noted)
    result = local(document)
    # Two choices a layer, and the one that the override leaves to 'fc', which is the last.
    assert len(forwards) == 2 * (len(result.layers) - 4) + 1
    again = local(document)
    assert (again.digest, again.created, again.mixed) == (result.digest, False, result.mixed)
    assert len(forwards) == 2 * (len(result.layers) - 4) + 1


def test_the_damage_is_what_the_network_shows(
    tiny_document: Document, tiny_checkpoint: Path, tiny_images: Path
) -> None:
    quantize = {"recipe": "paper", "bits": [8, 3], "overrides": {"fc": {"bits": [8]}}}
    document = tiny_document(quantize=quantize, analysis={"samples": 20})
    result = local(document)
    source = TensorSource(None, str(tiny_checkpoint))
    kwargs = {"num_classes": 10, "in_chans": 3}
    manifest = Registry(open_store(document["store"]["uri"])).resolve("tiny").manifest
    assert manifest.preprocessing is not None
    judging = open_images(tiny_images).sample(24).take(spread(24, 20))
    batches = judging.batches(Preprocessing.from_record(manifest.preprocessing), batch_size=8)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    reference = load_network("timm", "test_resnet", kwargs, source)
    layer = next(one for one in result.layers if one.name == "conv1.3")  # not behind a zero gamma
    network = load_network("timm", "test_resnet", kwargs, source)
    module = network.get_submodule(layer.name)
    quantized = quantize_weight(module.weight, NestConfig(bits=(8, 3)))  # type: ignore[arg-type]
    module.weight = torch.nn.Parameter(quantized.dequantize(0))
    with torch.inference_mode():
        own, seen = reference(images).double(), network(images).double()
    divergence = torch.nn.functional.kl_div(
        seen.log_softmax(1), own.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert layer.damage is not None
    assert layer.damage.divergence == pytest.approx(float(divergence), rel=1e-4)
    assert layer.damage.divergence > 1e-5
    assert layer.damage.same == 100 * float((own.argmax(1) == seen.argmax(1)).double().mean())
    right = [int((answers.argmax(1) == labels).sum()) for answers in (own, seen)]
    assert layer.damage.drop == 100 * (right[0] - right[1]) / 20
    assert (layer.damage.images, layer.damage.noise) == (20, False)
    assert layer.flips == quantized.flips(reference.get_submodule(layer.name).weight)  # type: ignore[arg-type]
    assert 0 < layer.flips[1] < layer.weights
    # The group's shard holds other layers too; this one's integers take no more than packed ones.
    assert layer.level_bytes[0] <= -(-3 * layer.weights // 8) + 16
    taken = sum(one.level_bytes[0] for one in result.layers)
    assert 0 < result.sizes.level_bytes[0] - taken < 0.2 * taken


def test_without_images_noise_tells_the_layers_apart(tiny_document: Document) -> None:
    document = tiny_document(quantize={"bits": [8, 4], "mixed": {"mean_bits": 3.5, "choices": [3, 4]}})
    del document["calibration"]
    result = local(document)
    assert result.mixed is not None
    assert result.mixed.mean_bits <= 3.5
    assert set(result.mixed.high_bits.values()) == {3, 4}
    assert {(layer.damage.noise, layer.damage.drop) for layer in result.layers if layer.damage} == {(True, None)}


def test_a_target_out_of_reach_stops_the_job_before_anything_is_quantized(tiny_document: Document) -> None:
    document = tiny_document(quantize={**QUANTIZE, "recipe": "paper", "mixed": {"target_bytes": 1000, "samples": 8}})
    with pytest.raises(PlanError, match=r"target_bytes: 1000 cannot be met: the smallest possible here is \d+ bytes"):
        local(document)
    assert not [key for key in keys(document["store"]["uri"], "jobs/") if "/units/" in key]
