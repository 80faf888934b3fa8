"""Images made of nothing but chance, which excite a network's layers much as photographs do.

The dead leaves model (Lee, Mumford & Huang 2001; as training images for networks: arXiv 2106.05963): opaque ellipses
and rectangles of every size fall on each other, the rarer the larger (the density of radii falls with their cube), so
that edges, corners and flat regions come in the proportions of natural images. Each leaf has a colour and a linear
shade; noise of spectrum ``1 / f^0.7`` lies over all as texture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAVES = 300
"""Leaves in one image: few pixels of the background are left."""

_RADII = (0.02, 0.5)
_ROUND = 0.6
_SHARED = 0.85
"""Correlation of two colour channels, as in photographs."""
_SHADE = 0.4
_TEXTURE = 0.3
_TEXTURE_POWER = 0.7
_CONTRAST = 0.95
"""Times the images' standard deviation: clipping at black and white takes little then."""


@dataclass(frozen=True)
class _Leaves:
    """Leaves of ``N`` images in their order of falling; places and radii as parts of the side.

    A point ``(x, y)`` lies on the leaf where ``along`` and ``across``, each ``[N, L, 3]`` as coefficients of
    ``(x, y, 1)``, are within the unit circle, or the unit square where ``square``, ``[N, L]``. ``colour`` is
    ``[N, L, C]``, ``shade``, ``[N, L]``, its change from the middle to the end.
    """

    along: Tensor
    across: Tensor
    square: Tensor
    colour: Tensor
    shade: Tensor


def synthetic_images(count: int, size: int, *, mean: Sequence[float], std: Sequence[float], seed: int) -> Tensor:
    """Return uint8 ``[count, size, size, C]``: images whose colours spread as ``mean`` and ``std`` (parts of 255) say.

    The same arguments give the same images.

    Raises:
        ValueError: ``count`` or ``size`` is below 1, or ``mean`` and ``std`` differ in length.
    """
    if count < 1 or size < 1 or len(mean) != len(std):
        raise ValueError(
            f"{count} images of {size} pixels, {len(mean)} means, {len(std)} deviations: expected 1 or more"
        )
    generator = torch.Generator().manual_seed(seed)
    leaves = _fall(count, len(mean), generator)
    image = _paint(leaves, _topmost(leaves, size)) + _TEXTURE * _texture(count, len(mean), size, generator)
    centre, spread = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    pixels = (centre + _CONTRAST * spread * image) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _fall(count: int, channels: int, generator: torch.Generator) -> _Leaves:
    chance = torch.rand(count, LEAVES, 6, generator=generator)
    colour = _coloured(torch.randn(count, LEAVES, channels + 1, generator=generator))
    shade = _SHADE * torch.randn(count, LEAVES, generator=generator)
    small, large = _RADII
    # A density that falls with the cube of the radius: 1 / r^2 is spread evenly.
    long = (small**-2 + (large**-2 - small**-2) * chance[..., 0]) ** -0.5
    short = long * (0.3 + 0.7 * chance[..., 1])
    x, y = 1.2 * chance[..., 2] - 0.1, 1.2 * chance[..., 3] - 0.1
    # The first one lies below all others and covers the whole image.
    long[:, 0], short[:, 0], x[:, 0], y[:, 0] = 1.0, 1.0, 0.5, 0.5
    angle = math.pi * chance[..., 4]
    cosine, sine = angle.cos(), angle.sin()
    along = torch.stack([cosine, sine, -(cosine * x + sine * y)], dim=-1) / long[..., None]
    across = torch.stack([-sine, cosine, sine * x - cosine * y], dim=-1) / short[..., None]
    return _Leaves(along, across, chance[..., 5] >= _ROUND, colour, shade)


def _topmost(leaves: _Leaves, size: int) -> Tensor:
    """Return int64 ``[N, size, size]``: which leaf is seen at each pixel."""
    at = _places(size)
    top = torch.zeros(len(leaves.colour), size, size, dtype=torch.int64)
    for leaf in range(1, LEAVES):  # each one covers what fell before it
        along, across = (_plane(lines[:, leaf], at).abs_() for lines in (leaves.along, leaves.across))
        reach = torch.where(
            leaves.square[:, leaf, None, None], torch.maximum(along, across), along.square() + across.square()
        )
        top.masked_fill_(reach < 1, leaf)
    return top


def _paint(leaves: _Leaves, top: Tensor) -> Tensor:
    """Return float32 ``[N, C, size, size]``: each pixel in the colour and shade of the leaf that is seen there."""
    count, size, _ = top.shape
    pixels = top.flatten(1)
    colour = leaves.colour.gather(1, pixels[..., None].expand(-1, -1, leaves.colour.shape[2]))
    lines = leaves.along * leaves.shade[..., None]
    slope = lines.gather(1, pixels[..., None].expand(-1, -1, 3)).view(count, size, size, 3)
    at = _places(size)
    shade = slope[..., 0] * at + slope[..., 1] * at[:, None] + slope[..., 2]
    return colour.view(count, size, size, -1).permute(0, 3, 1, 2) + shade[:, None]


def _texture(count: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Return float32 ``[N, C, size, size]``: coloured noise of mean square 1."""
    white = torch.randn(count, size, size, channels + 1, generator=generator)
    coloured = _coloured(white).permute(0, 3, 1, 2)
    vertical, horizontal = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    frequency = (vertical.square() + horizontal.square()).sqrt().clamp(min=0.7 / size)
    noise = torch.fft.irfft2(torch.fft.rfft2(coloured) / frequency**_TEXTURE_POWER, s=(size, size))
    scaled: Tensor = noise / noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return scaled


def _coloured(chance: Tensor) -> Tensor:
    """Return ``[..., C]`` of ``[..., C + 1]`` independent numbers: channels that share most of their variation."""
    return math.sqrt(_SHARED) * chance[..., :1] + math.sqrt(1 - _SHARED) * chance[..., 1:]


def _places(size: int) -> Tensor:
    return (torch.arange(size) + 0.5) / size


def _plane(lines: Tensor, at: Tensor) -> Tensor:
    """Return ``[N, S, S]``: ``a x + b y + c`` at every pixel, for coefficients ``[N, 3]``."""
    return (lines[:, :1] * at + lines[:, 2:])[:, None, :] + (lines[:, 1:2] * at)[:, :, None]
