"""The layout of an engine's graph: which of its tensors change with the level, and what goes into each.

A safetensors file. Its metadata hold ``format`` and ``layout``, a `Layout` as canonical JSON; its tensors are the
values that no shard holds, ``<tensor>/level<k>``: the biases of each level as the graph takes them.

The graph itself is whole but for the bytes of these tensors: in ONNX they are initializers with external data, in one
file of ``Layout.size_bytes`` bytes, each at its ``offset``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from storage.document import parse_record
from storage.errors import InvalidShard
from storage.manifest import (
    MAX_WEIGHTS,
    FloatRecord,
    LayerName,
    Manifest,
    Record,
    canonical_json,
    first_repeated,
)
from storage.tensor_file import load_tensors, save_tensors

FORMAT_LAYOUT = "nestquant.engine-layout.v1"
ALIGNMENT = 64
"""Where tensors begin in the file of weights: at multiples of so many bytes."""

_ITEM_BYTES = {"int8": 1, "int32": 4, "float32": 4}


class EngineTensor(Record):
    """One tensor of the graph that changes with the level.

    ``weight``: the integers of a layer on the full-bit grid, int8; ``order`` ``out_in`` has the output channel at axis
    0, as shards do, ``in_out`` has axes 0 and 1 exchanged. ``bias``: values from the layout itself, one set for each
    of ``levels`` levels; a higher level takes the last. A negative BatchNorm makes a scale of the graph negative:
    integers keep their sign.
    """

    name: str = Field(max_length=1024)
    layer: LayerName
    role: Literal["weight", "bias"]
    dtype: Literal["int8", "int32", "float32"]
    shape: tuple[int, ...] = Field(min_length=1, max_length=5)
    order: Literal["out_in", "in_out"] = "out_in"
    levels: int = Field(ge=1, le=8, default=1)
    offset: int = Field(ge=0, le=MAX_WEIGHTS)

    @property
    def size_bytes(self) -> int:
        """Return the bytes that the tensor takes in the file of weights."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def value_key(self, level: int) -> str:
        """Return the name in the layout's file of a bias at a level of the version."""
        return f"{self.name}/level{min(level, self.levels - 1)}"


class Layout(Record):
    """``tensors`` by offset; ``image`` and ``answer`` are the graph's input and output; ``kept_float`` lists what the
    engine computes in float though its weights are quantized, and why.
    """

    tensors: tuple[EngineTensor, ...]
    image: str = "image"
    answer: str = "answer"
    kept_float: tuple[FloatRecord, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Return the length of the file of weights."""
        return max((tensor.offset + tensor.size_bytes for tensor in self.tensors), default=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (twice := first_repeated(tensor.name for tensor in self.tensors)) is not None:
            raise ValueError(f"tensor {twice!r} stands twice")
        for one in self.tensors:
            if any(side < 1 for side in one.shape) or math.prod(one.shape) > MAX_WEIGHTS:
                raise ValueError(f"tensor {one.name!r}: shape {one.shape}")
            if one.offset % ALIGNMENT:
                raise ValueError(f"tensor {one.name!r} begins at {one.offset}, which is no multiple of {ALIGNMENT}")
        for before, after in pairwise(self.tensors):
            if after.offset < before.offset + before.size_bytes:
                raise ValueError(f"tensor {after.name!r} begins within {before.name!r}, or stands before it")
        return self


def aligned(offset: int) -> int:
    """Return where the next tensor may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def build_layout(layout: Layout, values: dict[str, npt.NDArray[Any]]) -> bytes:
    """Return the layout's file; ``values`` by `EngineTensor.value_key`."""
    return save_tensors(values, {"format": FORMAT_LAYOUT, "layout": canonical_json(layout).decode()})


def read_layout(raw: bytes, manifest: Manifest) -> tuple[Layout, dict[str, npt.NDArray[Any]]]:
    """Return a layout and its values, held against the manifest's layers. Raises `InvalidShard`."""
    values, metadata = load_tensors(raw)
    if metadata.get("format") != FORMAT_LAYOUT or set(metadata) != {"format", "layout"}:
        raise InvalidShard(f"engine layout: format {metadata.get('format')!r}, expected {FORMAT_LAYOUT!r}")
    try:
        layout = parse_record(metadata["layout"].encode(), Layout)
    except ValueError as error:
        raise InvalidShard(f"engine layout: {error}") from error
    layers = {layer.name: layer for layer in manifest.layers}
    for tensor in layout.tensors:
        layer = layers.get(tensor.layer)
        if layer is None:
            raise InvalidShard(
                f"engine layout: tensor {tensor.name!r} is of layer {tensor.layer!r}, which is not there"
            )
        if tensor.role == "weight":
            stored = [layer.out_channels(), math.prod(layer.shape) // layer.out_channels()]
            axis = 0 if tensor.order == "out_in" else 1
            fits = len(tensor.shape) > axis and tensor.shape[axis] == stored[0]
            if tensor.dtype != "int8" or not fits or math.prod(tensor.shape) != math.prod(stored):
                raise InvalidShard(
                    f"engine layout: tensor {tensor.name!r} is {tensor.dtype} {tensor.shape}, its layer {layer.shape}"
                )
            continue
        for level in range(tensor.levels):
            value = values.get(tensor.value_key(level))
            if value is None or value.dtype != np.dtype(tensor.dtype) or value.shape != tensor.shape:
                actual = "not there" if value is None else f"{value.dtype} {value.shape}"
                raise InvalidShard(
                    f"engine layout: {tensor.value_key(level)!r} is {actual}, expected {tensor.dtype} {tensor.shape}"
                )
    return layout, values
