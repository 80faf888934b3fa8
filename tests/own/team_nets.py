"""A team's own architecture, as tests hand it to jobs: in a file that nothing installs."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A depthwise and a pointwise convolution around which the input passes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.pointwise(self.depthwise(x))).relu()


class TeamNet(nn.Module):
    """Three blocks and a classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(3)))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def build(channels: int = 16, classes: int = 10) -> nn.Module:
    return TeamNet(channels, classes)


def build_nothing() -> str:
    return "nothing"


def build_badly() -> nn.Module:
    raise RuntimeError("no such depth")
