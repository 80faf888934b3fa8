"""Lanes: one forward that is the float network's and every level's, halted before each layer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nestquant.config import NestConfig
from nestquant.modules import nest_model, set_level
from nestquant.quantized_weight import QuantizedWeight, quantize_weight
from workers.lanes import Lanes, Probed

LAYERS = ("stem", "left", "right", "up", "head")
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """Branches that meet again, a transposed convolution, a batch norm, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        stem = self.norm(self.stem(inputs)).relu()
        merged = self.right(self.left(stem)) + self.left(stem)
        out: Tensor = self.head(self.up(merged).mean(dim=(2, 3)))
        return out


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def solved(net: nn.Module) -> dict[str, QuantizedWeight]:
    weights = {}
    for name in LAYERS:
        module = net.get_submodule(name)
        weight = module.weight.detach()
        first = weight.transpose(0, 1).contiguous() if name == "up" else weight
        weights[name] = quantize_weight(first, NestConfig(bits=(8, 3)))
    return weights


def first_inputs(net: nn.Module) -> dict[str, Tensor]:
    """What each layer's first call gets, as the network runs on its own."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, args[0])

        return hook

    for name in LAYERS:
        net.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.inference_mode():
        net(IMAGES)
    assert set(found) == set(LAYERS)
    return found


def test_each_lane_is_the_network_that_runs_its_level() -> None:
    weights = solved(network())
    lanes = Lanes(network(), LAYERS, 2)
    assert lanes.probe(IMAGES[:1], "net") == Probed(("stem", "left", "right", "up", "head"))
    walk = lanes.start(IMAGES)
    seen = {}
    for name in LAYERS:
        inputs = walk.reach(name)
        assert inputs is not None
        seen[name] = [lane.clone() for lane in inputs]
        lanes.apply(name, weights[name])
    assert walk.reach("") is None

    for lane, level in ((0, None), (1, 0), (2, 1)):
        reference = network()
        if level is not None:
            nest_model(reference, weights)
            set_level(reference, level)
        for name, inputs in first_inputs(reference).items():
            assert torch.allclose(seen[name][lane], inputs, atol=1e-5), (name, lane)
    assert not torch.allclose(seen["head"][0], seen["head"][1], atol=1e-3)


def test_walks_share_the_weights_and_each_halts_on_its_own() -> None:
    weights = solved(network())
    lanes = Lanes(network(), LAYERS, 2)
    first, second = lanes.start(IMAGES[:2]), lanes.start(IMAGES[2:])
    assert first.reach("stem") is not None
    assert first.reach("left") is None  # it stands before a layer without weights
    lanes.apply("stem", weights["stem"])
    assert first.reach("left")[0].shape == (2, 4, 8, 8)  # type: ignore[index]
    assert second.reach("left")[0].shape == (1, 4, 8, 8)  # type: ignore[index]
    first.close()
    second.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "nestquant-walk"]


def test_what_a_forward_raises_is_raised_where_it_is_asked_to_go_on() -> None:
    lanes = Lanes(network(), LAYERS, 1)
    walk = lanes.start(IMAGES[:, :2])
    assert walk.reach("stem") is not None
    lanes.apply("stem", solved(network())["stem"])
    with pytest.raises(RuntimeError, match="channels"):
        walk.reach("left")


class SequenceFirst(nn.Module):
    """Attention of the old kind: tokens come first, images second, so a lane is not a stretch of the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.unused = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.embed(inputs).flatten(2).permute(2, 0, 1)
        return self.inner(torch.cat([tokens, tokens[:2]])).mean(dim=0)  # type: ignore[no-any-return]


def test_layers_that_cannot_be_split_are_left_out() -> None:
    lanes = Lanes(SequenceFirst(), ("embed", "inner", "unused"), 2)
    assert lanes.probe(IMAGES[:1], "net") == Probed(
        ("embed",),
        {
            "inner": "its input does not come image by image along the first axis",
            "unused": "neither it is called with its input first, nor linear() with its weight",
        },
    )
