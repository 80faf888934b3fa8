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
