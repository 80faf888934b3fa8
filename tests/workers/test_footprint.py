"""Memory of a forward, traced on the meta device, by hand and against what a process really takes."""

from __future__ import annotations

import torch
from torch import nn

from workers.footprint import Footprint
from workers.inputs import networks


def traced(network: nn.Module, *shape: int) -> int:
    images = torch.zeros(*shape, device="meta")
    with torch.no_grad(), Footprint() as footprint:
        network(images)
    return footprint.peak_bytes


def test_a_layer_counts_what_it_makes_twice_and_what_it_reads_once_more() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(10, 100), nn.Linear(100, 30), nn.ReLU(inplace=True))
    # The first makes 100 floats (and lays them out anew), the second reads those and makes 30; the input is not ours.
    assert traced(network, 1, 10) == 4 * max(100 + 100, 130 + 130)


def test_what_is_dropped_no_longer_counts_and_what_is_kept_does() -> None:
    class Kept(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = x + 1
            return first + (x * 2).mul_(3)

    chain = nn.Sequential(*(nn.Linear(50, 50, bias=False, device="meta") for _ in range(9)))
    assert traced(chain, 1, 50) == 4 * (100 + 100)
    assert traced(Kept(), 1, 50) == 4 * (150 + 150)


def test_views_and_parameters_cost_nothing() -> None:
    network = nn.Linear(1000, 2, bias=False, device="meta")
    assert traced(network, 1, 1000) == 4 * (2 + 2)
    assert traced(nn.Flatten(), 1, 10, 10) == 0


def test_four_images_take_four_times_one() -> None:
    network = networks.build("timm", "test_resnet", meta=True)
    one = traced(network, 1, 3, 160, 160)
    assert 3.99 * one < traced(network, 4, 3, 160, 160) <= 4 * one  # what does not grow: the statistics of one layer
