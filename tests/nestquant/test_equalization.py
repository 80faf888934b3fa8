"""Channel sizes that move into the next layer: where they may, and that the network answers the same."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestquant.equalization import channel_gains, channel_sizes, equalize, find_sites


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        shuffled: Tensor = (
            x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        )
        return shuffled


class Residual(nn.Module):
    """The first ReLU's output has a shortcut, the second's has not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.inner, self.inner_bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.outer = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        return x + self.outer(torch.relu(self.inner_bn(self.inner(x))))


def seeded(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return network.eval()


def chain(*between: nn.Module) -> nn.Module:
    return seeded(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *between, nn.Conv2d(4, 4, 3, padding=1, groups=4))
    )


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("between", "passes"),
    [
        ((nn.ReLU(),), True),
        ((nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5)), True),
        ((nn.LeakyReLU(),), True),
        ((nn.ReLU(), Shuffle()), True),
        ((), True),
        ((nn.ReLU6(),), False),
        ((nn.SiLU(),), False),
        ((nn.GELU(),), False),
        ((nn.ReLU(), nn.Softmax2d()), False),
    ],
)
def test_only_what_a_factor_passes_through_is_resized(between: tuple[nn.Module, ...], passes: bool) -> None:
    sites = find_sites(chain(*between), IMAGE[:1])
    assert [(site.source, site.depthwise) for site in sites] == ([("1", True)] if passes else [])


def test_channels_are_followed_through_a_shuffle() -> None:
    (site,) = find_sites(chain(nn.ReLU(), Shuffle()), IMAGE[:1])
    assert site.readers[0].channels == (0, 2, 1, 3)


def test_channels_are_followed_into_a_linear_layer() -> None:
    network = seeded(nn.Sequential(nn.Conv2d(3, 2, 7), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)))
    (site,) = find_sites(network, IMAGE[:1])
    assert (site.source, site.readers[0].layer, site.readers[0].channels) == ("0", "3", (0,) * 4 + (1,) * 4)


def test_a_tensor_that_a_sum_reads_is_left_alone() -> None:
    assert [site.source for site in find_sites(seeded(Residual()), IMAGE[:1])] == ["inner_bn"]


def test_a_layer_that_is_called_twice_is_left_alone() -> None:
    layer = nn.Conv2d(4, 4, 1)
    assert [site.source for site in find_sites(chain(nn.ReLU(), layer, nn.ReLU(), layer), IMAGE[:1])] == []


@settings(deadline=None)  # the first run imports what torch.fx needs
@given(exponents=st.lists(st.integers(-4, 4), min_size=4, max_size=4))
def test_powers_of_two_leave_every_bit_of_the_answer(exponents: list[int]) -> None:
    network = chain(nn.ReLU(), Shuffle())
    resized = copy.deepcopy(network)
    (site,) = find_sites(network, IMAGE[:1])
    equalize(resized, site, torch.exp2(torch.tensor(exponents).double()))
    with torch.no_grad():
        assert torch.equal(resized(IMAGE), network(IMAGE))


def test_sizes_are_the_largest_values_and_a_power_of_one_makes_them_alike() -> None:
    network = chain(nn.ReLU())
    sites = find_sites(network, IMAGE[:1])
    with torch.no_grad():
        expected = network[:3](IMAGE).amax(dim=(0, 2, 3)).double()  # type: ignore[index]
    sizes = channel_sizes(network, sites, [IMAGE[:1], IMAGE[1:]])["1"]
    assert torch.allclose(sizes, expected, rtol=1e-6)  # a batch of two may add up in another order
    equalize(network, sites[0], channel_gains(sizes, 1.0))
    after = channel_sizes(network, sites, [IMAGE])["1"]
    assert torch.allclose(after, sizes.max().expand(4), rtol=1e-6)


def test_gains_have_exact_values() -> None:
    gains = channel_gains(torch.tensor([8.0, 2.0, 0.0, 1e-9]), 0.5)
    assert gains.tolist() == [1.0, 2.0, 1.0, 32.0]
