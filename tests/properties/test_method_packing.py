from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nestquant.packing import pack, packed_size, unpack

BITS = st.integers(1, 8)


@st.composite
def values_and_bits(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Integers of k bits: any shape (also empty or without dimensions), any alignment and stride."""
    bits = draw(BITS)
    elements = st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=9))
    values = draw(hnp.arrays(np.int8, shape, elements=elements))
    if draw(st.booleans()):
        values = values.T
    if values.ndim and draw(st.booleans()):
        values = values[:: draw(st.sampled_from([-1, 2, 3]))]
    return values, bits


@given(values_and_bits())
def test_unpack_undoes_pack(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = pack(values, bits)
    assert packed.size == -(-values.size * bits // 8)
    restored = unpack(packed, bits, values.shape)
    assert restored.dtype == np.int8
    assert restored.shape == values.shape
    assert np.array_equal(restored, values)


@given(values_and_bits())
def test_the_layout_is_one_little_endian_number(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    mask = (1 << bits) - 1
    stream = sum((value & mask) << (i * bits) for i, value in enumerate(values.reshape(-1).tolist()))
    assert pack(values, bits).tobytes() == stream.to_bytes(packed_size(values.size, bits), "little")


@given(BITS, st.binary(max_size=40), st.integers(0, 60), st.integers(0, 7))
def test_bytes_unpack_to_what_packs_to_them_or_are_refused(bits: int, data: bytes, count: int, offset: int) -> None:
    # A view at any byte offset of a larger buffer, as a shard's tensors are.
    packed = np.frombuffer(bytes(offset) + data, np.uint8)[offset:]
    try:
        values = unpack(packed, bits, (count,))
    except ValueError:
        padding = len(data) * 8 - count * bits
        assert not 0 <= padding < 8 or (padding and data[-1] >> (8 - padding))
    else:
        assert pack(values, bits).tobytes() == data


@given(BITS, st.integers(-(1 << 62), 1 << 62))
def test_a_value_out_of_range_is_named(bits: int, value: int) -> None:
    if -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        assert unpack(pack([0, value, 0], bits), bits, (3,)).tolist() == [0, value, 0]
    else:
        with pytest.raises(ValueError, match=f"value {value} does not fit"):
            pack([0, value, 0], bits)
