"""What calibration needs to know of a layer's inputs: their first and second moments, mergeable across workers.

Two networks run over the same images: the float one, and one whose earlier layers are quantized already. ``x`` is the
float network's input to the layer at one position (one patch of a convolution, one token of a linear layer), ``y`` the
quantized network's at the same position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

POSITIONS = 128
"""Positions of one image that count, at most: patches overlap, and more of them say little new."""

_SEED = 0


@dataclass(frozen=True)
class Moments:
    """Sums over ``count`` positions, for each of ``G`` groups of ``K`` inputs; float64.

    ``x`` and ``y``: the sums of each, ``[G, K]``. ``yy``: the sum of ``y y^T``, and ``xy`` that of ``x y^T``,
    ``[G, K, K]``.
    """

    count: int
    x: Tensor
    y: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Return the moments of columns ``[G, K, positions]`` as ``input_columns`` gives them.

        Products are taken in float32 of columns less their mean, which a large mean would drown, and the means' own
        products in float64 join them.
        """
        count = x.shape[-1]
        sums = [columns.sum(dim=-1, dtype=torch.float64) for columns in (x, y)]
        means = [total / count for total in sums]
        x, y = (columns - mean.float()[..., None] for columns, mean in zip((x, y), means, strict=True))
        # The mean as float32 took it away, and what it left over.
        held = [mean.float().double() for mean in means]
        left = [total - count * mean for total, mean in zip(sums, held, strict=True)]

        def product(a: int, b: int, centred: Tensor) -> Tensor:
            outer = torch.einsum("gi,gj->gij", sums[a], held[b]) + torch.einsum("gi,gj->gij", held[a], left[b])
            return centred.double() + outer

        return cls(count, sums[0], sums[1], product(0, 1, x @ y.mT), product(1, 1, y @ y.mT))

    @classmethod
    def merge(cls, parts: Sequence[Moments]) -> Moments:
        """Return the sums of all parts, added in the order given: the same order gives the same bits."""
        total = parts[0]
        for part in parts[1:]:
            total = cls(
                total.count + part.count,
                total.x + part.x,
                total.y + part.y,
                total.xy + part.xy,
                total.yy + part.yy,
            )
        return total

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return the covariances of ``x`` with ``y`` and of ``y`` with itself, ``[G, K, K]``."""
        x, y = self.x / self.count, self.y / self.count
        cross = self.xy / self.count - x[..., :, None] * y[..., None, :]
        own = self.yy / self.count - y[..., :, None] * y[..., None, :]
        return cross, own


def has_columns(module: nn.Module) -> bool:
    """Tell whether ``input_columns`` knows how the layer reads its input.

    A subclass may pad or normalise in a ``forward`` of its own, a transposed convolution has no patches.
    """
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear) and type(module).forward in {
        nn.Conv1d.forward,
        nn.Conv2d.forward,
        nn.Linear.forward,
    }


def input_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what each output of a layer is computed from: float32 ``[G, K, positions]``.

    ``K`` is the number of inputs of one output channel (input channels of a group times kernel elements, in the order
    of the flattened weight). At most ``POSITIONS`` of each image count, the same ones in every image of one size.

    Raises:
        TypeError: A layer of which `has_columns` is false.
    """
    if not has_columns(module):
        raise TypeError(f"no way to read the inputs of {type(module).__name__}")
    if isinstance(module, nn.Linear):
        tokens = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        chosen = tokens[:, _positions(tokens.shape[1])]
        return chosen.flatten(0, 1).t()[None]
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    return _patches(module, inputs)


def _patches(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode).contiguous()
    kernel, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
    if isinstance(module, nn.Conv1d):
        padded, kernel, stride, dilation = padded[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    images, channels, height, width = padded.shape
    rows = (height - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    by_image, by_channel, by_row, by_column = padded.stride()
    # A view of every patch; only those that are chosen are copied.
    view = padded.as_strided(
        (rows, columns, images, channels, *kernel),
        (
            by_row * stride[0],
            by_column * stride[1],
            by_image,
            by_channel,
            by_row * dilation[0],
            by_column * dilation[1],
        ),
    )
    chosen = _positions(rows * columns)
    patches = view[chosen // columns, chosen % columns]
    grouped = patches.reshape(len(chosen) * images, module.groups, -1)
    return grouped.permute(1, 2, 0)


def _positions(count: int) -> Tensor:
    """Return the positions that count, ascending; scattered, as a regular step would favour some columns."""
    if count <= POSITIONS:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randperm(count, generator=generator)[:POSITIONS].sort().values
