"""What an engine's graph takes at a level: integers from the shards, on the full-bit grid, and the level's biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nestquant.config import NestConfig
from nestquant.packing import unpack
from storage.engine_layout import EngineTensor, Layout
from storage.errors import InvalidShard
from storage.manifest import Descriptor, LayerRecord, Manifest, piece_key
from storage.shard import Shard, read_shard

Array = npt.NDArray[Any]
ReadBlob = Callable[[Descriptor], bytes]


def engine_tensors(
    manifest: Manifest, layout: Layout, values: dict[str, Array], read_blob: ReadBlob, level: int
) -> Iterator[tuple[EngineTensor, Array]]:
    """Yield every tensor that changes with the level, in the layout's order, C-contiguous in its dtype and shape.

    Args:
        manifest: the version.
        layout: of the engine's graph (`storage.engine_layout.read_layout`).
        values: the layout's own.
        read_blob: returns a blob's bytes, verified.
        level: 0 is part-bit.

    Raises:
        storage.InvalidShard: integers are not there, too many, or do not belong together.
    """
    layers = {layer.name: layer for layer in manifest.layers}
    shards = _Shards(manifest, read_blob)
    for tensor in layout.tensors:
        if tensor.role == "bias":
            yield tensor, values[tensor.value_key(level)]
            continue
        layer = layers[tensor.layer]
        whole = full_grid_integers(layer, shards, level)
        if tensor.order == "in_out":
            rest = tensor.shape[:1] + tensor.shape[2:]
            whole = np.swapaxes(whole.reshape(tensor.shape[1], *rest), 0, 1)
        yield tensor, np.ascontiguousarray(whole.reshape(tensor.shape))


def full_grid_integers(layer: LayerRecord, shards: _Shards, level: int) -> Array:
    """Return a layer's integers at a level as integers of the full-bit grid: int8 ``[O, weights of one channel]``."""
    level = min(level, len(layer.bits) - 1)
    widths = NestConfig(bits=layer.bits, scheme=layer.scheme).level_bits
    rows = math.prod(layer.shape) // layer.out_channels()
    full, value = layer.bits[0], np.empty((layer.out_channels(), rows), np.int8)
    for step in range(level + 1):
        # On the full-bit grid levels add up, each shifted by what its own grid lacks: eight bits hold each of them.
        shift = full - layer.bits[-1 - step]
        for piece in layer.pieces:
            key = piece_key(layer.name, piece.start, piece.stop, step)
            shard, shape = shards.at(piece.group, step), (piece.stop - piece.start, rows)
            payload = shard.payload(key, count=math.prod(shape))
            part = (
                payload.view(np.int8).reshape(shape)
                if shard.codec == "zstd"
                else unpack(payload.view(np.uint8), widths[step], shape)
            )
            at = value[piece.start : piece.stop]
            if step == 0:
                np.left_shift(part, shift, out=at)
                continue
            # The last integer of a grid and the largest low part come to the last one of the finer grid: a sum leaves
            # it at the lower end alone.
            lowest = at == -(1 << (full - 1))
            if lowest.any() and int(part[lowest].min()) < 0:
                raise InvalidShard(
                    f"layer {layer.name!r}: its levels add up beyond {layer.bits[-1 - step]} bits; they are not of one "
                    "version"
                )
            np.add(at, part << shift if shift else part, out=at)
    return value


class _Shards:
    """The last shard read of each level: layers stand in execution order, and so do their pieces."""

    def __init__(self, manifest: Manifest, read_blob: ReadBlob) -> None:
        self._manifest, self._read_blob = manifest, read_blob
        self._shards: dict[int, tuple[int, Shard]] = {}

    def at(self, group: int, level: int) -> Shard:
        if self._shards.get(level, (-1, None))[0] != group:
            self._shards[level] = group, read_shard(self._read_blob(self._manifest.groups[group].levels[level]))
        return self._shards[level][1]
