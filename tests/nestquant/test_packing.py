from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from nestquant.packing import pack, packed_size, unpack

# 0, -1, smallest, largest, twice over: one whole lane; then -1 and padding. Worked out by hand for 1 to 4 bits.
GOLDEN = {
    1: "6601",
    2: "6c6c03",
    3: "38877307",
    4: "f078f0780f",
    5: "e0c3073e7c1f",
    6: "c00f7ec00f7e3f",
    7: "803ff007f8037f7f",
    8: "00ff807f00ff807fff",
}


def _smallest(bits: int) -> int:
    return -(1 << (bits - 1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_golden_bytes(bits: int) -> None:
    values = np.array([0, -1, _smallest(bits), ~_smallest(bits)] * 2 + [-1], dtype=np.int8)
    packed = pack(values, bits)
    assert packed.dtype == np.uint8
    assert packed.tobytes().hex() == GOLDEN[bits]
    assert np.array_equal(unpack(packed, bits, (9,)), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_across_blocks_it_is_the_documented_bit_stream(bits: int) -> None:
    count = 8 * (1 << 14) * 2 + 13
    values = np.random.default_rng(bits).integers(_smallest(bits), -_smallest(bits), count, dtype=np.int8)
    packed = pack(values.reshape(1, -1), bits)
    bit_rows = np.unpackbits(values.view(np.uint8)[:, None], axis=1, bitorder="little")[:, :bits]
    assert np.array_equal(packed, np.packbits(bit_rows.reshape(-1), bitorder="little"))
    assert packed.size == packed_size(count, bits) == -(-count * bits // 8)
    assert np.array_equal(unpack(packed, bits, (count,)), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_values_take_no_bytes(bits: int) -> None:
    assert pack(np.zeros((0, 3), np.int8), bits).size == 0
    assert unpack(np.zeros(0, np.uint8), bits, (0, 3)).shape == (0, 3)


def test_any_integer_type_and_layout_packs_the_same() -> None:
    values = np.random.default_rng(0).integers(-4, 4, (6, 5), dtype=np.int64)
    expected = pack(values.astype(np.int8), 3)
    assert np.array_equal(pack(values, 3), expected)
    assert np.array_equal(pack(values.tolist(), 3), expected)
    assert np.array_equal(pack(np.asfortranarray(values.astype(np.int16)), 3), expected)


def test_inputs_are_left_alone_and_results_are_new() -> None:
    values = np.array([1, -1], dtype=np.int8)
    for bits in (4, 8):
        packed = pack(values, bits)
        packed.setflags(write=False)
        restored = unpack(packed, bits, (2,))
        restored[0] = -2
        assert values.tolist() == [1, -1]
        assert unpack(packed, bits, (2,)).tolist() == [1, -1]
        assert not np.shares_memory(pack(values, bits), values)


@pytest.mark.parametrize(
    ("values", "bits", "error", "message"),
    [
        ([0, 8], 4, ValueError, r"value 8 does not fit 4 signed bits, \[-8, 7\]"),
        ([-9, 0], 4, ValueError, "value -9 does not fit"),
        ([1], 1, ValueError, r"value 1 does not fit 1 signed bits, \[-1, 0\]"),
        (np.array([200], dtype=np.uint8), 8, ValueError, "value 200"),
        ([1 << 40], 8, ValueError, "value 1099511627776"),
        ([0.5], 4, TypeError, "float64"),
        ([True], 4, TypeError, "bool"),
        ([0], 0, ValueError, "from 1 to 8; got 0"),
        ([0], 9, ValueError, "from 1 to 8; got 9"),
    ],
)
def test_pack_refuses(values: Any, bits: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(values, bits)


@pytest.mark.parametrize(
    ("packed", "bits", "shape", "error", "message"),
    [
        (b"\x00\x00", 4, (3, 2), ValueError, "takes 3 bytes; got 2"),
        (b"\x00\x00\x00\x00", 4, (3, 2), ValueError, "takes 3 bytes; got 4"),
        (b"\x00\x10", 4, (3,), ValueError, "4 padding bits after the last value must be zero; the last byte is 0x10"),
        (b"\x02", 1, (1,), ValueError, "7 padding bits"),
        (b"\x00", 4, (-1,), ValueError, "negative"),
        (b"\x00", 9, (1,), ValueError, "from 1 to 8"),
    ],
)
def test_unpack_refuses(packed: bytes, bits: int, shape: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unpack(np.frombuffer(packed, np.uint8), bits, shape)


def test_unpack_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="int8"):
        unpack(np.zeros(1, np.int8), 4, (2,))  # type: ignore[arg-type]


def test_packing_needs_no_torch() -> None:
    program = "import sys, nestquant.packing, nestquant.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
