"""The comparison with other quantizers: what it calls quantized, what it measures again, what its table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.benchmarks import peers, peers_report
from tests.benchmarks.accuracy_table import MODELS
from tests.benchmarks.peer_runs.row import on_grid, products
from tests.benchmarks.peers import PEERS, missing, published_floats

FLOATS = {
    "resnet20_cifar10": (915, 1000),
    "resnet56_cifar10": (926, 1000),
    "vit_cifar10_p4_d128_l4": (717, 1000),
    "fdmobilenet_wd2": (888, 1300),
    "menet108_8x1_g3": (899, 1300),
    "squeezenet_v1_1": (945, 1300),
    "efficientnet_lite0": (1083, 1300),
}


def nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


@pytest.mark.parametrize("values", [9, 64, 600])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_a_grid_are_told_from_floats_and_from_a_finer_grid(values: int, bits: int) -> None:
    weight = torch.randn(200, values, generator=torch.Generator().manual_seed(7))
    assert on_grid(nearest(weight, bits), bits)
    assert not on_grid(weight, bits)
    assert not on_grid(nearest(weight, bits + 2), bits)
    mixed = nearest(weight, bits)
    mixed[150] = weight[150]  # one channel that was left out
    assert not on_grid(mixed, bits)
    assert on_grid(torch.zeros(3, values), bits)


def test_products_are_the_weights_that_a_forward_pass_uses() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)
    ).eval()
    with torch.no_grad():
        network[0].weight.copy_(nearest(network[0].weight.flatten(1), 4).view(6, 1, 3, 3))
    found = products(network, torch.randn(1, 3, 5, 5), 4)
    assert [(one.kind, one.shape, one.on_grid) for one in found] == [
        ("conv2d", (6, 1, 3, 3), True),
        ("linear", (5, 54), False),
    ]
    assert [one.weights for one in found] == [54, 270]


def test_float_counts_are_read_from_the_test_datas_readme(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "DATA", test_data)
    assert published_floats() == FLOATS


def test_a_row_that_stands_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "decoded", lambda source: source)
    peer, model = PEERS[0], MODELS[0]
    results: dict[str, Any] = {"float": {}, "rows": []}
    first = list(missing(results, peer, model))
    assert [(task["recipe"], task["bits"], task["check_float"]) for task in first] == [
        ("gptq", 4, True),
        ("gptq-asym", 4, False),
        ("gptq-plain", 4, False),
        ("gptq-plain", 8, False),
    ]
    row = {key: first[2][key] for key in ("model", "recipe", "bits", "settings")} | {"peer": peer.name}
    results = {"float": {peer.name: {model.name: 915}}, "rows": [row]}
    assert [(task["recipe"], task["bits"]) for task in missing(results, peer, model, ["gptq-plain"])] == [
        ("gptq-plain", 8)
    ]
    results["rows"][0]["settings"] = row["settings"] | {"equalize": 5}
    assert [task["bits"] for task in missing(results, peer, model, ["gptq-plain"])] == [4, 8]
    assert [task["recipe"] for task in missing(results, peer, model, width=8)] == ["gptq-plain"]


def test_the_table_sets_ours_beside_the_best_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_report, "RESULTS", tmp_path)
    common = {
        "model": "resnet20_cifar10",
        "images": 1000,
        "samples": 256,
        "torch": "2.15.0+cu132",
        "version": "1.2",
        "seconds": 3.2,
        "peak_rss_bytes": 512 * 2**20,
        "load_average": 1.5,
        "weights": 100,
        "products": 4,
        "settings": {"batch": 32},
    }
    whole = {"weights_on_grid": 100, "products_on_grid": 4}
    rows = [
        common | whole | {"peer": "brevitas", "recipe": "gptq", "bits": 4, "correct": 910},
        common | whole | {"peer": "aimet-torch", "recipe": "ptq", "bits": 4, "correct": 912},
        common | whole | {"peer": "brevitas", "recipe": "gptq", "bits": 8, "correct": 918},
        common
        | {"peer": "nncf", "recipe": "all", "bits": 4, "correct": 917, "weights_on_grid": 9, "products_on_grid": 1},
        {**common, "peer": "torchao", "recipe": "intx", "bits": 4, "error": "TypeError: no"},
    ]
    ours = {
        "model": "resnet20_cifar10",
        "bits": [8, 4],
        "recipe": "calibrated",
        "measured": {"part": {"correct": 917, "total": 1000}, "full": {"correct": 916, "total": 1000}},
        "stage_seconds": {"reconstruct": 400.4, "quantize": 0.1},
    }
    document = {
        "float_top1": {"resnet20_cifar10": {"correct": 915, "total": 1000}},
        "rows": [ours | {"recipe": "paper"}, ours, ours | {"bits": [8, 3]}, ours | {"model": "resnet20, first 300"}],
    }
    (tmp_path / "accuracy.json").write_text(json.dumps(document))
    peers_report.write_table({"rows": rows}, FLOATS, "calibrated")
    written = (tmp_path / "peers.md").read_text().splitlines()
    assert "| resnet20_cifar10, 91.5 | INT4 | 91.7 ± 0.9 | 91.2 ± 0.9 | aimet-torch `ptq` | +0.5 |" in written
    assert "|  | INT8 | 91.6 ± 0.9 | 91.8 ± 0.9 | brevitas `gptq` | -0.2 |" in written
    assert "| resnet20_cifar10 | INT4 | ours, part-bit of 8 over 4 | calibrated | 91.7 ± 0.9 | 400 | - | - |" in written
    assert "| resnet20_cifar10 | INT4 | brevitas 1.2 | gptq | 91.0 ± 0.9 | 3 | 512 | 1.5 |" in written
    assert (
        "- resnet20_cifar10: nncf 1.2 `all` INT4: 3 of 4 convolutions and products have weights on no even grid of 16 "
        "values a channel (top-1 91.7 ± 0.9)"
    ) in written
    assert "- resnet20_cifar10: torchao 1.2 `intx` INT4: TypeError: no" in written
