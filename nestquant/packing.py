"""Signed integers of k bits in exactly ``ceil(N * k / 8)`` bytes; numpy alone, so that service and device share it.

Layout, version 1: the values in C order, each as the k low bits of its two's complement, form one stream of bits; bit
``b`` of the stream is bit ``b % 8`` (0 the least significant) of byte ``b // 8``. So 8 values make k whole bytes,
value ``i`` starts at bit ``i * k``, and the bits after the last value are zero. There is no header: bits and shape
travel beside the bytes.

Speed: 8 values are one 64-bit lane. Three rounds of shift and mask close the gaps between neighbours (8 -> 16 ->
    32 -> 64 bits) in all lanes
at once; then k bytes of each lane are stream. Blocks of lanes stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK_LANES = 1 << 14
"""128 KiB of lanes and as much of scratch: within a core's second-level cache."""

_Lanes = NDArray[np.uint64]


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` values of ``bits`` bits take: ``ceil(count * bits / 8)``."""
    return (count * bits + 7) // 8


def pack(values: ArrayLike, bits: int) -> NDArray[np.uint8]:
    """Return integers of any shape, each within ``bits`` signed bits, as ``uint8 [packed_size(N, bits)]``.

    Raises:
        ValueError: Bits out of 1..8, or a value out of range, which is named.
        TypeError: Values that are not integers.
    """
    _check_bits(bits)
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"values must be integers; got {array.dtype}")
    flat = np.ascontiguousarray(array).reshape(-1)
    _check_values(flat, bits)
    flat = flat.astype(np.uint8, casting="unsafe", copy=False) if flat.dtype != np.int8 else flat.view(np.uint8)
    if bits == 8:
        return flat.copy()
    lanes = -(-flat.size // 8)
    packed = np.empty(lanes * bits, dtype=np.uint8)
    triples = _as_groups(packed, bits)
    for start in range(0, lanes, _BLOCK_LANES):
        stop = min(start + _BLOCK_LANES, lanes)
        lane = np.zeros(stop - start, dtype=np.uint64)
        part = flat[start * 8 : stop * 8]
        np.bitwise_and(part, (1 << bits) - 1, out=lane.view(np.uint8)[: part.size])
        _close_gaps(lane, bits)
        triples[start:stop] = _low_bytes(lane, bits)
    return packed[: packed_size(flat.size, bits)]


def unpack(packed: NDArray[np.uint8], bits: int, shape: Sequence[int]) -> NDArray[np.int8]:
    """Return the int8 array of ``shape`` that ``pack`` made ``packed`` of.

    Raises:
        ValueError: Bits out of 1..8, a negative dimension, a length that is not exactly ``packed_size``, or padding
            bits that are not zero.
        TypeError: ``packed`` is not uint8.
    """
    _check_bits(bits)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must not be negative; got {tuple(shape)}")
    if packed.dtype != np.uint8:
        raise TypeError(f"packed must be uint8; got {packed.dtype}")
    count = math.prod(shape)
    flat = np.ascontiguousarray(packed).reshape(-1)
    if flat.size != packed_size(count, bits):
        raise ValueError(f"shape {tuple(shape)} at {bits} bits takes {packed_size(count, bits)} bytes; got {flat.size}")
    used = count * bits % 8
    if used and flat[-1] >> used:
        raise ValueError(
            f"the {8 - used} padding bits after the last value must be zero; the last byte is {flat[-1]:#04x}"
        )
    if bits == 8:
        return flat.view(np.int8).reshape(tuple(shape)).copy()
    lanes = -(-count // 8)
    if flat.size != lanes * bits:
        flat = np.concatenate([flat, np.zeros(lanes * bits - flat.size, dtype=np.uint8)])
    triples = _as_groups(flat, bits)
    values = np.empty(lanes, dtype=np.uint64)
    sign = np.uint8(1 << (bits - 1))
    for start in range(0, lanes, _BLOCK_LANES):
        lane = values[start : start + _BLOCK_LANES]
        lane[:] = 0
        _low_bytes(lane, bits)[:] = triples[start : start + _BLOCK_LANES]
        _open_gaps(lane, bits)
        octets = lane.view(np.uint8)
        # Sign extension: with the sign bit flipped, values count up from the smallest; taking it away again lets the
        # borrow fill the upper bits.
        np.bitwise_xor(octets, sign, out=octets)
        np.subtract(octets, sign, out=octets)
    return values.view(np.int8)[:count].reshape(tuple(shape))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8; got {bits}")


def _check_values(flat: NDArray[np.integer], bits: int) -> None:
    if not flat.size:
        return
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for value in (int(flat.min()), int(flat.max())):
        if not low <= value <= high:
            raise ValueError(f"value {value} does not fit {bits} signed bits, [{low}, {high}]")


def _close_gaps(lane: _Lanes, bits: int) -> None:
    """Move the 8 values of each lane, one a byte, together at its low end, in place."""
    for width in (8, 16, 32):
        offset = bits * width // 8
        low = _mask(offset, 2 * width)
        upper = lane >> np.uint64(width - offset)
        np.bitwise_and(upper, low << np.uint64(offset), out=upper)
        np.bitwise_and(lane, low, out=lane)
        np.bitwise_or(lane, upper, out=lane)


def _open_gaps(lane: _Lanes, bits: int) -> None:
    """Undo ``_close_gaps``, in place."""
    for width in (32, 16, 8):
        offset = bits * width // 8
        low = _mask(offset, 2 * width)
        upper = lane << np.uint64(width - offset)
        np.bitwise_and(upper, low << np.uint64(width), out=upper)
        np.bitwise_and(lane, low, out=lane)
        np.bitwise_or(lane, upper, out=lane)


def _mask(ones: int, period: int) -> np.uint64:
    """Return a 64-bit word with the ``ones`` low bits of each ``period`` bits set."""
    return np.uint64(sum(((1 << ones) - 1) << at for at in range(0, 64, period)))


def _as_groups(octets: NDArray[np.uint8], size: int) -> NDArray[np.void]:
    """View bytes as groups of ``size``: numpy copies a group in one step."""
    return octets.view(np.dtype((np.void, size)))


def _low_bytes(lane: _Lanes, size: int) -> NDArray[np.void]:
    """View the ``size`` low bytes of each lane (little endian)."""
    dtype = np.dtype({"names": ["low"], "formats": [np.dtype((np.void, size))], "offsets": [0], "itemsize": 8})
    return lane.view(dtype)["low"]
