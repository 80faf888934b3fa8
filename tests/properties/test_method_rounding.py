from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nestquant._flip_kernels import kernel_pass
from nestquant.config import NestConfig, signed_range
from nestquant.nesting import decompose, recompose
from nestquant.quantized_weight import quantize_weight
from nestquant.rounding import adaptive_round
from tests.nestquant.rounding_reference import reference_round

BITS = st.integers(1, 8)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 24)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)


@st.composite
def grids(draw: st.DrawFn, *, margin: float) -> tuple[np.ndarray, int, int]:
    """Real numbers on a grid: smooth ones, or sixteenths, where all is ties; up to ``margin`` beyond the range."""
    qmin, qmax = signed_range(draw(BITS))
    low, high = qmin - margin, qmax + margin
    smooth = st.floats(low, high, width=32)
    ties = st.integers(math.ceil(low * 16), math.floor(high * 16)).map(lambda sixteenths: sixteenths / 16)
    return draw(hnp.arrays(np.float32, draw(SHAPES), elements=draw(st.sampled_from([smooth, ties])))), qmin, qmax


@given(grids(margin=3.0))
@settings(max_examples=400, deadline=None)
def test_it_is_the_reference(case: tuple[np.ndarray, int, int]) -> None:
    x, qmin, qmax = case
    q = adaptive_round(torch.from_numpy(x), qmin=qmin, qmax=qmax)
    assert np.array_equal(q.numpy(), reference_round(x, qmin, qmax))


@given(grids(margin=0.0))
@settings(deadline=None)
def test_each_integer_is_a_neighbour_and_every_channel_sum_is_small(case: tuple[np.ndarray, int, int]) -> None:
    x, qmin, qmax = case
    # A range wide enough that its ends hinder nothing.
    q = adaptive_round(torch.from_numpy(x), qmin=max(qmin - 1, -128), qmax=min(qmax + 1, 127)).numpy()
    error = q.astype(np.float64) - x
    assert np.abs(error).max() < 1
    if qmin > -128 and qmax < 127:
        assert np.abs(error.reshape(len(x), -1).sum(axis=1)).max() <= 0.5 + 1e-9
        # After the kernel pass at most 0.5; the channel pass may then flip one element more.
        assert np.abs(error.reshape(*x.shape[:2], -1).sum(axis=2)).max() <= (1 + 1e-9 if x[0, 0].size > 1 else np.inf)


@given(
    hnp.arrays(np.float64, st.integers(1, 49), elements=st.integers(-(1 << 19), 1 << 19).map(lambda i: i / (1 << 20)))
)
@settings(deadline=None)
def test_the_kernel_pass_leaves_at_most_a_half(error: np.ndarray) -> None:
    q = np.zeros_like(error)
    before = error.copy()
    candidate = kernel_pass(error, error.copy(), q, 0, error.size)
    assert abs(error.sum()) <= 0.5
    assert np.array_equal(error, before + q)
    assert np.abs(error).max() <= 1
    assert (candidate == -1) == (before.sum() == 0)


@given(grids(margin=0.5), st.data())
@settings(deadline=None)
def test_channels_are_independent(case: tuple[np.ndarray, int, int], data: st.DataObject) -> None:
    x, qmin, qmax = case
    order = data.draw(st.permutations(range(len(x))))
    whole = adaptive_round(torch.from_numpy(x), qmin=qmin, qmax=qmax)
    rows = [adaptive_round(torch.from_numpy(x[i : i + 1]), qmin=qmin, qmax=qmax) for i in order]
    assert torch.equal(whole[list(order)], torch.cat(rows))


@st.composite
def bit_lists(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(sorted(draw(st.sets(BITS, min_size=1, max_size=4)), reverse=True))


@given(bit_lists(), st.sampled_from(["adaptive", "nearest"]), st.data())
@settings(deadline=None)
def test_nesting_is_exact_and_every_level_fits(bits: tuple[int, ...], rounding: str, data: st.DataObject) -> None:
    low, high = signed_range(bits[0])
    q = data.draw(hnp.arrays(np.int8, data.draw(SHAPES), elements=st.integers(low, high)))
    parts = decompose(torch.from_numpy(q), bits, rounding=rounding)  # type: ignore[arg-type]
    assert np.array_equal(recompose(parts, bits).numpy(), q)
    for part, width in zip(parts, NestConfig(bits).level_bits, strict=True):
        part_low, part_high = signed_range(width)
        assert part_low <= int(part.min()) <= int(part.max()) <= part_high
    # A device that stops at any level has exactly the integers of quantizing to that level's bits from the one above.
    for count in range(1, len(bits) + 1):
        assert torch.equal(
            recompose(parts[:count], bits),
            recompose(parts, bits) if count == len(bits) else _descend(q, bits, count, rounding),
        )


def _descend(q: np.ndarray, bits: tuple[int, ...], count: int, rounding: str) -> torch.Tensor:
    return decompose(torch.from_numpy(q), bits[: len(bits) - count + 1], rounding=rounding)[0]  # type: ignore[arg-type]


@given(
    hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    bit_lists(),
    st.sampled_from(["asymmetric", "symmetric"]),
)
@settings(deadline=None)
def test_any_finite_weight_quantizes(weight: np.ndarray, bits: tuple[int, ...], scheme: str) -> None:
    if scheme == "symmetric" and bits[0] == 1:
        return
    quantized = quantize_weight(torch.from_numpy(weight), NestConfig(bits, scheme))  # type: ignore[arg-type]
    restored = quantized.dequantize().double()
    step = quantized.qparams.scale.double().view(-1, *(1,) * (weight.ndim - 1))
    assert torch.isfinite(restored).all()
    assert float(((restored - torch.from_numpy(weight).double()).abs() / step).max()) < 1.5 + 1e-3
    zero = quantized.qparams.zero_point.view(step.shape)
    low, high = signed_range(bits[0])
    assert ((zero >= low) & (zero <= high)).all()
