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

from nestquant.layer_calls import LayerCall, layer_calls

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
        rounded = [mean.float().double() for mean in means]
        rest = [total - count * mean for total, mean in zip(sums, rounded, strict=True)]

        def product(a: int, b: int, centred: Tensor) -> Tensor:
            outer = torch.einsum("gi,gj->gij", sums[a], rounded[b]) + torch.einsum("gi,gj->gij", rounded[a], rest[b])
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


class UnreadableInputs(TypeError):
    """A layer of which it is not known what its weight is multiplied by; the message says why."""


def input_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what each output of a layer is computed from: float32 ``[G, K, positions]``.

    ``K`` is the number of inputs of one output channel (input channels of a group times kernel elements, in the order
    of the flattened weight). At most ``POSITIONS`` of each image count, the same ones in every image of one size. The
    layer runs on ``inputs``: what counts is the functional call that it makes with its weight (``layer_calls``).

    Raises:
        UnreadableInputs: The layer makes no such call, or several.
    """
    call = _call(module, inputs)
    if call.form == "linear":
        tokens = call.inputs.reshape(call.inputs.shape[0], -1, call.inputs.shape[-1])
        chosen = tokens[:, _positions(tokens.shape[1])]
        return chosen.flatten(0, 1).t()[None]
    return _patches(call, call.weight.shape[2:])


def _call(module: nn.Module, inputs: Tensor) -> LayerCall:
    """Return the one functional call that a layer makes with its weight."""
    try:
        calls = layer_calls(module, inputs)
    except Exception as error:  # somebody else's forward raises anything: one that wants more than its input, for one
        raise UnreadableInputs(f"{type(module).__name__} does not run on its first input alone") from error
    if len(calls) != 1:
        times = f"{len(calls)} times" if calls else "in no convolution or linear map"
        raise UnreadableInputs(f"{type(module).__name__} uses its weight {times}")
    return calls[0]


def _patches(call: LayerCall, kernel: tuple[int, ...]) -> Tensor:
    options, flat = call.options, len(kernel) == 1
    stride, dilation = (_sizes(options.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    padded = functional.pad(call.inputs, _margins(options.get("padding", 0), kernel, dilation)).contiguous()
    if flat:
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
    grouped = patches.reshape(len(chosen) * images, int(options.get("groups", 1)), -1)
    return grouped.permute(1, 2, 0)


def _sizes(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Return an option of a convolution for each of its dimensions: functional calls take one number for all."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * count if len(sizes) == 1 else sizes


def _margins(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return zeros before and after each dimension, the last one first, as ``pad`` takes them."""
    if padding == "same":  # torch puts the odd one behind
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(size, size) for size in _sizes(0 if isinstance(padding, str) else padding, len(kernel))]
    return [size for pair in reversed(pairs) for size in pair]


def _positions(count: int) -> Tensor:
    """Return the positions that count, ascending; scattered, as a regular step would favour some columns."""
    if count <= POSITIONS:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randperm(count, generator=generator)[:POSITIONS].sort().values
