"""A piece of a layer in its shards: the names under which integers and grid stand, written and read here alone.

<layer>[<start>:<stop>]/level<k>      integers of level k, in the shard of level k
<layer>[<start>:<stop>]/scale         float32, beside the integers of level 0, as are
<layer>[<start>:<stop>]/zero_point    int16
<layer>[<start>:<stop>]/biases        float16 [levels, rows], where levels have biases of their own
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nestquant.affine import QParams
from nestquant.packing import pack, unpack
from nestquant.quantized_weight import QuantizedWeight
from storage.manifest import piece_key
from storage.shard import Int8Array, IntegerTensor, Shard


@dataclass(frozen=True)
class Grid:
    """What stands beside a layer's integers in its level-0 shards."""

    qparams: QParams
    biases: torch.Tensor | None

    @classmethod
    def joined(cls, parts: list[Grid]) -> Grid:
        """Return the grid of a whole layer from those of its pieces, in order."""
        qparams = QParams(
            torch.cat([part.qparams.scale for part in parts]), torch.cat([part.qparams.zero_point for part in parts])
        )
        biases = [part.biases for part in parts if part.biases is not None]
        return cls(qparams, torch.cat(biases, dim=1) if biases else None)


@dataclass(frozen=True)
class PieceCode:
    """Output channels ``start:stop`` of a layer, by the names that its shards use."""

    layer: str
    start: int
    stop: int

    def key(self, level: int) -> str:
        """Return the name of the integers of a level."""
        return piece_key(self.layer, self.start, self.stop, level)

    def _beside(self, what: str) -> str:
        return f"{self.layer}[{self.start}:{self.stop}]/{what}"

    def integers(self, weight: QuantizedWeight, level: int) -> dict[str, IntegerTensor]:
        """Return what ``build_shard`` stores for a level of this piece."""
        values, bits = weight.parts[level].numpy(), weight.config.level_bits[level]
        return {self.key(level): IntegerTensor(values, pack(values, bits), bits, values.shape)}

    def grid(self, weight: QuantizedWeight) -> dict[str, npt.NDArray[Any]]:
        """Return what ``build_shard`` stores beside the integers of level 0."""
        tensors: dict[str, npt.NDArray[Any]] = {
            self._beside("scale"): weight.qparams.scale.numpy(),
            self._beside("zero_point"): weight.qparams.zero_point.numpy().astype(np.int16),
        }
        if weight.biases is not None:
            tensors[self._beside("biases")] = weight.biases.numpy()
        return tensors

    def read_integers(self, shard: Shard, level: int, bits: int, row_shape: tuple[int, ...]) -> Int8Array:
        """Return a level's integers, int8 ``[stop - start, *row_shape]``. Raises `InvalidShard`."""
        shape = (self.stop - self.start, *row_shape)
        payload = shard.payload(self.key(level), count=math.prod(shape))
        # The codec says what a payload is: integers already, or packed ones.
        return (
            payload.view(np.int8).reshape(shape)
            if shard.codec == "zstd"
            else unpack(payload.view(np.uint8), bits, shape)
        )

    def read_grid(self, shard: Shard, *, biases: bool) -> Grid:
        """Return what stands beside the integers of level 0. Raises `InvalidShard`."""
        scale = torch.from_numpy(shard.tensor(self._beside("scale")))
        zero_point = torch.from_numpy(shard.tensor(self._beside("zero_point"))).to(torch.int32)
        own = torch.from_numpy(shard.tensor(self._beside("biases"))) if biases else None
        return Grid(QParams(scale, zero_point), own)
