"""The moments of layers that are called several times, that others call for, or that transform their weights."""

from __future__ import annotations

import pytest
import timm
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional

from nestquant.modules import nest_model, set_level
from nestquant.moments import Moments, input_columns
from nestquant.surgery import execution_order, find_layers
from workers.in_memory import Solved, round_alone, solve
from workers.lanes import Lanes, Probed
from workers.layer_moments import layer_moments
from workers.tasks import PieceTask


def pieces(network: nn.Module, example: Tensor, bits: tuple[int, ...] = (8, 4)) -> list[PieceTask]:
    sites = {site.name: site for site in find_layers(network).layers}
    return [
        PieceTask(
            layer=name,
            parameter=sites[name].state_key,
            start=0,
            stop=sites[name].channel_first_shape[0],
            kind=sites[name].kind,
            shape=sites[name].shape,
            groups=sites[name].groups,
            bits=bits,
            scheme="asymmetric",
            rounding="adaptive",
        )
        for name in execution_order(network, example).names
    ]


def inputs_of(network: nn.Module, layer: str, images: Tensor) -> list[Tensor]:
    """What goes into each call of a layer as the network runs on its own."""
    calls: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    with torch.inference_mode():
        network(images)
    handle.remove()
    return calls


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(one: Moments, other: Moments) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in ("x", "y", "xy", "yy"))
    return one.count == other.count and all(torch.allclose(*pair, rtol=1e-5, atol=1e-3) for pair in pairs)


def test_every_call_of_a_shared_layer_counts() -> None:
    """CoaT's position encodings are called once in each block of a stage."""
    torch.manual_seed(0)
    network = timm.create_model("coat_lite_tiny", img_size=32).eval()
    shared, images = "cpe1.proj", noise(2, 3, 32, 32)
    names = [piece.layer for piece in pieces(network, images[:1])]
    calls = inputs_of(network, shared, images)
    assert len(calls) == 2
    lanes = Lanes(network, names, 2)
    probed = lanes.probe(images[:1], "coat")
    assert not probed.unsplit
    assert not probed.unreadable
    for name in probed.laned:
        if name != shared:
            lanes.leave(name)
    walk = lanes.start(images)
    with torch.inference_mode():
        totals = layer_moments(walk, shared, (0, 1))
    walk.close()
    columns = [input_columns(network.get_submodule(shared), call) for call in calls]
    expected = Moments.merge([Moments.of(one, one) for one in columns])
    assert len(totals) == 2
    assert all(same(total, expected) for total in totals)


def test_a_layer_that_is_called_once_counts_once() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)).eval()
    images = noise(5, 3, 6, 6)
    lanes = Lanes(network, ["0", "1"], 1)
    lanes.probe(images[:1], "net")
    assert not lanes.repeats
    walk = lanes.start(images)
    with torch.inference_mode():
        (total,) = layer_moments(walk, "0", (0,))
    walk.close()
    assert total.count == 5 * 16


def divergence(network: nn.Module, solved: list[Solved], images: Tensor, float_answers: Tensor) -> float:
    """The part-bit network's squared error over the float one's answers."""
    nest_model(network, {one.piece.layer: one.weight for one in solved})
    set_level(network, 0)
    with torch.inference_mode():
        return float((network(images) - float_answers).square().mean())


def test_a_network_of_standardised_weights_is_solved_whole() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        network: nn.Module = timm.create_model("test_nfnet", num_classes=10).eval()
        for module in network.modules():  # a trained network's are not zero
            if isinstance(module, timm.layers.ScaledStdConv2d):
                nn.init.ones_(module.gain)
        return network

    network, images = build(), noise(6, 3, 64, 64)
    layers = pieces(network, images[:1])
    probed = Lanes(build(), [piece.layer for piece in layers], 2).probe(images[:1], "nfnet")
    standardised = {name for name, module in network.named_modules() if isinstance(module, timm.layers.ScaledStdConv2d)}
    assert standardised
    assert probed.transforms.keys() == standardised
    assert all(transform.centred for transform in probed.transforms.values())
    solved = list(solve(network, layers, [images[:4], images[4:]], "nfnet"))
    assert [(one.without, one.weight.biases is not None) for one in solved] == [(None, True)] * len(layers)
    with torch.inference_mode():
        answers = network(images)
    plain = list(round_alone(network, layers))
    assert divergence(build(), solved, images, answers) < 0.5 * divergence(build(), plain, images, answers)


class Attention(nn.Module):
    """Self-attention as BEiT has it: the projection is a layer whose weight the attention uses itself."""

    def __init__(self, width: int, *, biased: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=biased), nn.Linear(width, width)
        self.own = None if biased else nn.Parameter(torch.ones(3 * width))

    def forward(self, tokens: Tensor) -> Tensor:
        bias = self.qkv.bias if self.own is None else self.own * 0.5
        query, key, value = functional.linear(input=tokens, weight=self.qkv.weight, bias=bias).chunk(3, dim=-1)
        answer: Tensor = self.proj(functional.scaled_dot_product_attention(query, key, value))
        return answer


class Fused(nn.Module):
    """Torch's own attention, over other keys than queries where ``crossed``."""

    def __init__(self, width: int, *, first: bool, crossed: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=first)
        self.first, self.crossed = first, crossed

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens if self.first else tokens.transpose(0, 1)
        others = tokens.flip(1 if self.first else 0).relu() if self.crossed else tokens
        answer: Tensor = self.inner(tokens, others, others, need_weights=False)[0]
        return answer if self.first else answer.transpose(0, 1)


class Network(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 8, 4, stride=4), attention
        self.head = timm.layers.Linear(8, 5)  # with a forward of its own

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).mT
        answer: Tensor = self.head((tokens + self.attention(tokens)).mean(dim=1))
        return answer


LENT = [
    ({"biased": True}, Attention, ("qkv", "proj"), frozenset[str]()),
    ({"biased": False}, Attention, ("qkv", "proj"), frozenset({"attention.qkv"})),
    ({"first": True, "crossed": False}, Fused, ("inner", "inner.out_proj"), frozenset({"attention.inner"})),
    ({"first": False, "crossed": False}, Fused, ("inner", "inner.out_proj"), frozenset({"attention.inner"})),
    ({"first": True, "crossed": True}, Fused, ("inner", "inner.out_proj"), frozenset({"attention.inner"})),
]


@pytest.mark.parametrize(("options", "kind", "inner", "unbiased"), LENT, ids=str)
def test_a_layer_that_is_not_called_is_solved_at_the_call_with_its_weight(
    options: dict[str, bool], kind: type[nn.Module], inner: tuple[str, str], unbiased: frozenset[str]
) -> None:
    def build() -> Network:
        torch.manual_seed(0)
        return Network(kind(8, **options)).eval()

    names = ("stem", *(f"attention.{name}" for name in inner), "head")
    images = noise(12, 3, 16, 16)
    layers = {piece.layer: piece for piece in pieces(build(), images[:1])}
    lanes = Lanes(build(), names, 2)
    assert lanes.probe(images[:1], "net") == Probed(names, unbiased=unbiased)
    solved = list(solve(build(), list(layers.values()), [images[:8], images[8:]], "net"))
    assert [one.without for one in solved] == [None] * 4
    weights = {one.piece.layer: one.weight for one in solved}
    assert {name for name, weight in weights.items() if weight.biases is None} == unbiased

    # What a lane shows each layer is what the network shows it that runs these weights.
    walk = lanes.start(images)
    shown: dict[str, tuple[Tensor, ...]] = {}
    for name in names:
        inputs = walk.reach(name)
        assert inputs is not None
        shown[name] = tuple(lane.clone() for lane in inputs)
        lanes.apply(name, weights[name])
    assert walk.reach("") is None
    for lane, level in ((1, 0), (2, 1)):
        network = build()
        nest_model(network, weights)
        set_level(network, level)
        for name in ("stem", "head"):
            assert torch.allclose(shown[name][lane], inputs_of(network, name, images)[0], atol=1e-5), (name, lane)
        assert not torch.allclose(shown["head"][0], shown["head"][lane], atol=1e-6)
