"""What calibration needs to know of a layer's inputs: their first and second moments, mergeable across workers.

Two networks run over the same images: the float one, and one whose earlier layers are quantized already. ``x`` is the
float network's input to the layer at one position (one patch of a convolution, one token of a linear layer), ``y`` the
quantized network's at the same position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from nestquant.layer_calls import LayerCall, layer_calls
from nestquant.weight_transforms import WeightTransform, transform_of

POSITIONS = 128
"""Positions of one image that count, at most: patches overlap, and more of them say little new."""

MAX_INPUTS = 8192
"""More inputs of an output channel than these are taken in blocks."""

BLOCK_INPUTS = 2048
"""Inputs of one such block, at most."""

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

    def second(self) -> tuple[Tensor, Tensor]:
        """Return the means of ``x y^T`` and ``y y^T``, ``[G, K, K]``: where no bias makes a mean error good."""
        return self.xy / self.count, self.yy / self.count

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return the covariances of ``x`` with ``y`` and of ``y`` with itself, ``[G, K, K]``."""
        x, y = self.x / self.count, self.y / self.count
        cross = self.xy / self.count - x[..., :, None] * y[..., None, :]
        own = self.yy / self.count - y[..., :, None] * y[..., None, :]
        return cross, own


class UnreadableInputs(TypeError):
    """A layer of which it is not known what its weight is multiplied by; the message says why."""


@dataclass(frozen=True)
class ReadInputs:
    """What each output of a layer is computed from: ``columns`` float32 ``[G, K, positions]``.

    ``transform``: how the layer's weight is transformed before. ``biased``: whether a bias of the layer's own would be
    added.
    """

    columns: Tensor
    transform: WeightTransform | None = None
    biased: bool = True


def input_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what each output of a layer is computed from: float32 ``[G, K, positions]``.

    ``K`` is the number of inputs of one output channel (input channels of a group times kernel elements, in the order
    of the flattened weight, output channels first). More than ``MAX_INPUTS`` come in blocks, each a group of its own
    (``input_blocks``). At most ``POSITIONS`` of each image count, the same ones in every image of one size. The layer
    runs on ``inputs``: what counts is the functional call that it makes with its weight (``layer_calls``).

    Raises:
        UnreadableInputs: The layer makes no such call, or several, or transforms its weight before in a way of its own.
    """
    return read_inputs(module, inputs).columns


def read_inputs(module: nn.Module, inputs: Tensor) -> ReadInputs:
    """Return ``input_columns`` with the transform of the weight; raises as it does."""
    call = _call(module, inputs)
    try:
        transform = transform_of(call, cast("Tensor", module.weight))
    except ValueError as error:
        raise UnreadableInputs(f"{type(module).__name__} {error}") from error
    if call.form == "linear":
        return ReadInputs(linear_columns(call.inputs), transform, call.biased)
    if call.form == "convolution":
        columns = _patches(call, call.weight.shape[2:])
    else:
        columns = _patches(_convolution_of(call), call.weight.shape[2:], flipped=True)
    return ReadInputs(in_blocks(columns.mT).mT, transform, call.biased)


def linear_columns(inputs: Tensor) -> Tensor:
    """Return ``input_columns`` of a linear map over ``inputs`` ``[N, ..., K]``."""
    tokens = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    chosen = tokens[:, _positions(tokens.shape[1])]
    return in_blocks(chosen.flatten(0, 1)[None]).mT


def input_blocks(inputs: int) -> tuple[int, int]:
    """Return into how many blocks the inputs of an output channel are split, and how many are in each of them.

    A layer is solved block by block where one matrix of all its inputs would take over 512 MiB and its solution
    minutes: what one block's rounding costs the outputs is not made good in another.
    """
    if inputs <= MAX_INPUTS:
        return 1, inputs
    blocks = -(-inputs // BLOCK_INPUTS)
    return blocks, -(-inputs // blocks)


def in_blocks(values: Tensor) -> Tensor:
    """Return ``[G, R, K]`` as ``[G * blocks, R, inputs of a block]``, the last block filled up with zeros."""
    groups, rows, inputs = values.shape
    blocks, size = input_blocks(inputs)
    if blocks == 1:
        return values
    padded = functional.pad(values, (0, blocks * size - inputs))
    return padded.reshape(groups, rows, blocks, size).transpose(1, 2).flatten(0, 1)


def from_blocks(values: Tensor, groups: int, inputs: int) -> Tensor:
    """Return ``[groups, R, inputs]`` of what ``in_blocks`` made; its inverse."""
    if values.shape[0] == groups:
        return values
    whole = values.reshape(groups, -1, *values.shape[1:]).transpose(1, 2).flatten(2)
    return whole[..., :inputs]


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


def _convolution_of(call: LayerCall) -> LayerCall:
    """Return a transposed convolution as one over its inputs with zeros between them (its kernel is flipped)."""
    options, kernel = call.options, call.weight.shape[2:]
    stride, padding, dilation, extra = (
        _sizes(options.get(name, default), 2)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
    )
    height, width = call.inputs.shape[2:]
    spaced = call.inputs.new_zeros((*call.inputs.shape[:2], (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1))
    spaced[:, :, :: stride[0], :: stride[1]] = call.inputs
    before = [step * (size - 1) - less for step, size, less in zip(dilation, kernel, padding, strict=True)]
    margins = (before[1], before[1] + extra[1], before[0], before[0] + extra[0])
    options = {"dilation": dilation, "groups": options.get("groups", 1)}
    return LayerCall("convolution", functional.pad(spaced, margins), call.weight, options)


def _patches(call: LayerCall, kernel: tuple[int, ...], *, flipped: bool = False) -> Tensor:
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
    if flipped:
        patches = patches.flip((-2, -1))
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
