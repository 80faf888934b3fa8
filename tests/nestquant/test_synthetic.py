"""Synthetic images: deterministic, coloured as asked, and edged as photographs are."""

from __future__ import annotations

import pytest
import torch

from nestquant import synthetic
from nestquant.synthetic import synthetic_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others() -> None:
    images = synthetic_images(3, 32, mean=MEAN, std=STD, seed=5)
    assert (images.dtype, images.shape, images.is_contiguous()) == (torch.uint8, (3, 32, 32, 3), True)
    assert torch.equal(synthetic_images(3, 32, mean=MEAN, std=STD, seed=5), images)
    other = synthetic_images(3, 32, mean=MEAN, std=STD, seed=6)
    assert (other != images).float().mean() > 0.9
    assert (images[0] != images[1]).float().mean() > 0.9


def test_colours_spread_as_the_preprocessing_says_and_channels_go_together() -> None:
    pixels = normalised(synthetic_images(24, 48, mean=MEAN, std=STD, seed=0)).flatten(0, 2)
    assert pixels.mean(dim=0).abs().max() < 0.3
    assert 0.75 < pixels.std(dim=0).min() <= pixels.std(dim=0).max() < 1.25
    correlation = torch.corrcoef(pixels.t())
    assert 0.75 < correlation.min() < 0.95
    assert synthetic_images(2, 9, mean=(0.5,), std=(0.5,), seed=0).shape == (2, 9, 9, 1)


def test_neighbours_are_alike_but_for_edges() -> None:
    pixels = normalised(synthetic_images(8, 96, mean=MEAN, std=STD, seed=0))
    step = (pixels[:, :, 1:] - pixels[:, :, :-1]).flatten()
    assert step.square().mean() < 0.4 * 2 * pixels.var()  # twice the variance for noise without neighbours
    kurtosis = step.pow(4).mean() / step.square().mean().square()
    assert kurtosis > 6  # 3 for any Gaussian noise, pink included; photographs have 10 and more


def test_a_leaf_covers_the_points_within_its_outline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "LEAVES", 3)
    # An ellipse around (0.5, 0.5) with radii 0.4 and 0.2; then a square of half-side 0.1 around (0.25, 0.5).
    along = torch.tensor([[[0.0, 0.0, 0.0], [1 / 0.4, 0.0, -0.5 / 0.4], [10.0, 0.0, -2.5]]])
    across = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1 / 0.2, -0.5 / 0.2], [0.0, 10.0, -5.0]]])
    square = torch.tensor([[False, False, True]])
    leaves = synthetic._Leaves(along, across, square, torch.zeros(1, 3, 3), torch.zeros(1, 3))
    seen = synthetic._topmost(leaves, 40)[0]
    at = (torch.arange(40) + 0.5) / 40
    x, y = at[None], at[:, None]
    expected = torch.where(((x - 0.5) / 0.4) ** 2 + ((y - 0.5) / 0.2) ** 2 < 1, 1, 0)
    expected = torch.where(((x - 0.25).abs() < 0.1) & ((y - 0.5).abs() < 0.1), 2, expected)
    assert torch.equal(seen, expected)
    assert seen.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(("count", "size", "std"), [(0, 8, STD), (1, 0, STD), (1, 8, (0.2,))])
def test_what_makes_no_image_is_refused(count: int, size: int, std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        synthetic_images(count, size, mean=MEAN, std=std, seed=0)


def test_a_seed_stands_for_these_images() -> None:
    """Versions made from synthetic images can be made again; a last bit of a sine may move a pixel by one."""
    colour = [
        [154, 165, 133, 123, 106, 65, 128, 102, 89, 122, 122, 126, 113, 121, 131],
        [123, 97, 98, 179, 162, 162, 117, 89, 59, 45, 0, 0, 109, 123, 93],
        [100, 78, 37, 109, 82, 50, 93, 71, 31, 155, 125, 84, 255, 196, 255],
        [133, 124, 130, 146, 150, 159, 171, 199, 151, 125, 73, 71, 137, 137, 142],
        [138, 174, 140, 109, 143, 126, 170, 215, 161, 88, 67, 32, 149, 146, 148],
    ]
    images = synthetic_images(2, 5, mean=MEAN, std=STD, seed=7)
    assert (images[0].flatten(1).int() - torch.tensor(colour)).abs().max() <= 1
    grey = [
        [134, 117, 128, 108, 111, 199],
        [80, 76, 33, 106, 193, 93],
        [84, 58, 61, 145, 147, 29],
        [115, 85, 197, 137, 134, 89],
        [121, 130, 132, 73, 124, 100],
        [191, 100, 210, 185, 126, 92],
    ]
    (image,) = synthetic_images(1, 6, mean=(0.5,), std=(0.25,), seed=8)
    assert (image[..., 0].int() - torch.tensor(grey)).abs().max() <= 1


def test_leaves_lie_all_over_the_image_and_are_long_or_round() -> None:
    leaves = synthetic._fall(50, 3, torch.Generator().manual_seed(0))
    along, across = leaves.along.double()[:, 1:], leaves.across.double()[:, 1:]
    long, short = 1 / along[..., :2].norm(dim=-1), 1 / across[..., :2].norm(dim=-1)
    # Of 14,950 leaves: radii from 0.02 to 0.5, half of them below 0.0283; axes from 0.3 to 1 times as long, evenly.
    assert 0.02 <= long.min() < 0.0201
    assert 0.4 < long.max() <= 0.5
    assert abs(long.median() - 0.0283) < 0.0005
    ratio = short / long
    assert 0.3 - 1e-5 <= ratio.min() < 0.301
    assert 0.999 < ratio.max() < 1 + 1e-5
    assert abs(ratio.mean() - 0.65) < 0.005
    assert abs(torch.corrcoef(torch.stack([ratio.flatten(), long.flatten()]))[0, 1]) < 0.03
    # The middle is where both planes are zero: from -0.1 to 1.1 both ways, evenly, and independent of the axes.
    planes = torch.stack([along, across], dim=-2)
    middle = torch.linalg.solve(planes[..., :2], -planes[..., 2])
    for at in (middle[..., 0], middle[..., 1]):
        assert -0.1 - 1e-4 < at.min() < -0.099
        assert 1.099 < at.max() < 1.1 + 1e-4
        assert abs(at.mean() - 0.5) < 0.01
        assert abs(torch.corrcoef(torch.stack([ratio.flatten(), at.flatten()]))[0, 1]) < 0.03
    assert abs(leaves.square[:, 1:].double().mean() - 0.4) < 0.015
    # The first covers everything: a circle of radius 1 around the middle of the image.
    first = torch.stack([leaves.along[:, 0], leaves.across[:, 0]], dim=1)
    assert torch.allclose(first[..., :2].norm(dim=-1), torch.ones(50, 2))
    assert torch.allclose(first @ torch.tensor([0.5, 0.5, 1.0]), torch.zeros(50, 2), atol=1e-6)
