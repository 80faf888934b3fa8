"""A level on the full-bit grid, from shards: the integers that torch recomposes, and none beyond a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestquant.config import level_bits
from nestquant.engines.weights import full_grid_integers
from nestquant.nesting import decompose, recompose, to_full_grid
from nestquant.packing import pack
from storage.errors import InvalidShard
from storage.manifest import LayerRecord, Piece, piece_key
from storage.shard import IntegerTensor, Shard, build_shard, read_shard

BITS = ((8, 4), (8, 6, 4), (8, 7, 1), (8,), (6, 3), (7, 5, 2))
SHAPE = (6, 5, 3, 3)
EDGE = 4  # where the first piece ends


class Opened:
    """Shards by group and level, as a session opens them."""

    def __init__(self, parts: Sequence[np.ndarray], bits: tuple[int, ...]) -> None:
        self.shards: dict[tuple[int, int], Shard] = {}
        for level, (part, width) in enumerate(zip(parts, level_bits(bits), strict=True)):
            for group, (start, stop) in enumerate(((0, EDGE), (EDGE, SHAPE[0]))):
                piece = np.ascontiguousarray(part[start:stop])
                shape = (stop - start, 45)
                tensor = IntegerTensor(piece.reshape(shape), pack(piece, width), width, shape)
                raw = build_shard({piece_key("conv", start, stop, level): tensor}, {}).data
                self.shards[group, level] = read_shard(raw)

    def at(self, group: int, level: int) -> Shard:
        return self.shards[group, level]


def layer_of(bits: tuple[int, ...]) -> LayerRecord:
    pieces = (Piece(group=0, start=0, stop=EDGE), Piece(group=1, start=EDGE, stop=SHAPE[0]))
    return LayerRecord(
        name="conv", kind="conv2d", parameter="conv.weight", shape=SHAPE, bits=bits, scheme="symmetric", pieces=pieces
    )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 2**32 - 1), st.booleans())
def test_levels_add_up_to_what_torch_recomposes(bits: tuple[int, ...], seed: int, peaked: bool) -> None:
    bound = 1 << (bits[0] - 1)
    random = np.random.default_rng(seed)
    # Peaked ones are smaller as zstd, the others packed.
    values = random.normal(0, bound / 12, SHAPE) if peaked else random.integers(-bound, bound, SHAPE)
    q = torch.from_numpy(values.round().clip(-bound, bound - 1).astype(np.int8))
    parts = decompose(q, bits)
    opened = Opened([part.numpy() for part in parts], bits)
    for level in range(len(bits)):
        expected = to_full_grid(recompose(parts[: level + 1], bits), bits, level).numpy().reshape(6, 45)
        actual = full_grid_integers(layer_of(bits), opened, level)  # type: ignore[arg-type]
        assert actual.dtype == np.int8
        np.testing.assert_array_equal(actual, expected)


def at_the_end(bits: tuple[int, ...], *, upper: bool) -> Opened:
    """Return shards whose every part has one weight at its end."""
    parts = []
    for width in level_bits(bits):
        part = np.zeros(SHAPE, np.int8)
        part[5, 4, 2, 2] = (1 << (width - 1)) - 1 if upper else -(1 << (width - 1))
        parts.append(part)
    return Opened(parts, bits)


@pytest.mark.parametrize("bits", [bits for bits in BITS if len(bits) > 1])
def test_parts_that_add_up_beyond_the_grid_are_refused(bits: tuple[int, ...]) -> None:
    """All parts at their upper end come to the grid's last integer; at their lower end they are of two versions."""
    whole = full_grid_integers(layer_of(bits), at_the_end(bits, upper=True), len(bits) - 1)  # type: ignore[arg-type]
    assert whole.max() == (1 << (bits[0] - 1)) - 1
    below = at_the_end(bits, upper=False)
    high = full_grid_integers(layer_of(bits), below, 0)  # type: ignore[arg-type]
    assert high.min() == -(1 << (bits[0] - 1))
    with pytest.raises(InvalidShard, match=r"layer 'conv': its levels add up beyond \d bits; they are not of one"):
        full_grid_integers(layer_of(bits), below, 1)  # type: ignore[arg-type]
