"""A network in this process's memory: the arithmetic of the recipes, and none of the work of a job around it.

The same functions in the same order on the same chunks as workers run them, so the integers are those of a job on one
kind of machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestquant.engines.images import Preprocessing
from nestquant.moments import Moments
from nestquant.norm_statistics import NormSums, put_statistics
from nestquant.observers import Histogram
from nestquant.quantized_weight import QuantizedWeight, quantize_weight
from nestquant.surgery import channel_first, shallow_copy
from workers.calibrate import observed
from workers.errors import WorkError
from workers.forward import extents, network_boundary, run_network
from workers.lanes import Lanes, Walk
from workers.layer_moments import layer_moments, solve_layer
from workers.reconstruct import chosen_levels
from workers.synthesize import CHUNK, SAMPLES, make_chunk, normalised
from workers.tasks import PieceTask
from workers.threads import threads


@dataclass(frozen=True)
class Solved:
    """A layer's integers, and why they were rounded without data; None where they were not, or no recipe asked."""

    piece: PieceTask
    weight: QuantizedWeight
    without: str | None = None


def round_alone(network: nn.Module, layers: Sequence[PieceTask]) -> Iterator[Solved]:
    """Yield every layer as the recipe ``paper`` rounds it, by its weights alone.

    Raises:
        WorkError: naming the layer, where its weights cannot be quantized.
    """
    for piece in layers:
        yield Solved(piece, _rounded(piece, _weight(network, piece)))


@torch.no_grad()
def solve(network: nn.Module, layers: Sequence[PieceTask], chunks: Sequence[Tensor], name: str) -> Iterator[Solved]:
    """Yield every layer as the recipe ``calibrated`` solves it.

    Args:
        network: the float network, in eval mode on the CPU; it is not changed.
        layers: each as a piece of all its output channels, in execution order.
        chunks: inputs ``[N, ...]``; a chunk's moments are taken at once.
        name: what messages call the network.

    Raises:
        WorkError: naming the layer, where its weights or inputs are not finite.
        ModelError: the network does not run on the inputs.
    """
    walked = shallow_copy(network)
    level_count = max(len(piece.bits) for piece in layers)
    lanes = Lanes(walked, [piece.layer for piece in layers], level_count)
    with threads(1):
        probed = lanes.probe(_example(chunks[0]), name)
    without = dict(probed.unsplit)
    for layer in probed.unsplit:
        lanes.leave(layer)
    named = {piece.layer: piece for piece in layers}
    for layer in probed.laned:
        reason = probed.unreadable.get(layer)
        if reason is not None:
            without[layer] = reason
    walks = [lanes.start(chunk) for chunk in chunks]
    try:
        for layer in (*(piece.layer for piece in layers if piece.layer not in probed.laned), *probed.laned):
            piece = named[layer]
            moments: list[Moments] = []
            if layer not in without:
                with network_boundary(walked, f"{name} cannot run on inputs of {extents(chunks[0])}"):
                    moments = _moments(piece, walks, level_count)
            weight = _weight(network, piece)
            solved = solve_layer(piece, weight, moments, probed)
            if layer in probed.laned:
                lanes.apply(layer, solved)
            reason = without.get(layer, "it was not called on any calibration input")
            yield Solved(piece, solved, None if moments else reason)
    finally:
        for walk in walks:
            walk.close()


@torch.inference_mode()
def observe_inputs(
    network: nn.Module, layers: Sequence[str], batches: Sequence[Tensor], name: str
) -> dict[str, Histogram]:
    """Return the histogram of what goes into each layer of the float network; a layer that never ran has none.

    Raises:
        WorkError: an activation is not finite; the message names the layer.
        ModelError: the network does not run on the inputs.
    """
    with threads(1), observed(network, tuple(layers)) as histograms:
        for batch in batches:
            run_network(network, batch, name)
    return histograms


@torch.no_grad()
def synthesized(network: nn.Module, preprocessing: Preprocessing, name: str) -> tuple[nn.Module, Tensor]:
    """Return the network with BatchNorm statistics taken on images made from chance, and those images as inputs.

    Raises:
        DataError: the network takes images of neither one nor three channels.
        WorkError: what goes into a BatchNorm is not finite; the message names it.
        ModelError: the network does not run on the images.
    """
    fitted = shallow_copy(network, own=True)
    chunks = [
        make_chunk(fitted, preprocessing, min(CHUNK, SAMPLES - start), chunk, name)
        for chunk, start in enumerate(range(0, SAMPLES, CHUNK))
    ]
    norms = chunks[0][1]
    put_statistics(fitted, {norm: NormSums.merge([sums[norm] for _, sums in chunks]) for norm in norms})
    return fitted, torch.cat([normalised(images, preprocessing) for images, _ in chunks])


def _example(chunk: Tensor) -> Tensor:
    """Return one input to look with: noise, as a job takes it, or where inputs are integers, the first."""
    if not chunk.is_floating_point():
        return chunk[:1]
    return torch.randn((1, *chunk.shape[1:]), generator=torch.Generator().manual_seed(0)).to(chunk.dtype)


def _moments(piece: PieceTask, walks: Sequence[Walk], level_count: int) -> list[Moments]:
    """Return the moments of a layer's inputs for each of its levels; none where it is not called."""
    chosen = chosen_levels(level_count, piece.config.level_count)
    with threads(1), torch.inference_mode():
        chunks = [parts for walk in walks if (parts := layer_moments(walk, piece.layer, chosen))]
    return [Moments.merge(parts) for parts in zip(*chunks, strict=True)]


def _weight(network: nn.Module, piece: PieceTask) -> Tensor:
    """Return a layer's float32 weight, output channels first, in memory of its own."""
    layer, parameter = network.get_submodule(piece.layer), piece.parameter.rpartition(".")[2]
    weight = layer.get_parameter(parameter).detach()
    return channel_first(weight, piece.kind, piece.groups).to(torch.float32, copy=True).contiguous()


def _rounded(piece: PieceTask, weight: Tensor) -> QuantizedWeight:
    try:
        return quantize_weight(weight, piece.config)
    except ValueError as error:
        raise WorkError(f"Layer {piece.layer!r}: {error}") from error
