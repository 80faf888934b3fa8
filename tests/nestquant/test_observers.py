from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from nestquant.observers import ActivationQParams, Histogram, activation_range, fake_quantize


def _same(a: Histogram, b: Histogram) -> bool:
    return (a.exponent, a.low, a.high) == (b.exponent, b.low, b.high) and np.array_equal(a.counts, b.counts)


def _data(seed: int, size: int = 5000) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 2.0, size).astype(np.float32)


def test_bins_are_powers_of_two_wide_and_counts_are_exact() -> None:
    histogram = Histogram.of(torch.tensor([0.0, 1.0, 3.0, -3.0]))
    # The largest magnitude, 3, needs 4 = 2^2 on each side, in 4096 = 2^12 bins.
    assert histogram.exponent == 2 - 12
    assert histogram.counts.dtype == np.int64
    assert {int(i) - 4096: int(histogram.counts[i]) for i in np.flatnonzero(histogram.counts)} == {
        0: 1,
        1024: 1,
        3072: 1,
        -3072: 1,
    }
    assert (histogram.low, histogram.high, histogram.count) == (-3.0, 3.0, 4)


@pytest.mark.parametrize("value", [0.0, 1.0, 4.0, -4.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
def test_every_magnitude_falls_within_the_bins(value: float) -> None:
    histogram = Histogram.of(torch.tensor([value]))
    assert histogram.count == 1
    centre = float(histogram.centers()[np.flatnonzero(histogram.counts)[0]])
    assert abs(centre - float(np.float32(value))) <= 0.5 * 2.0**histogram.exponent


def test_merging_is_exact_in_any_order_and_grouping() -> None:
    parts = [_data(0), _data(1) * 100, np.zeros(7, np.float32), np.abs(_data(2)) * 1e-3]
    whole = Histogram.of(np.concatenate(parts))
    for order in itertools.permutations(Histogram.of(part) for part in parts):
        a, b, c, d = order
        assert _same(a.merge(b).merge(c).merge(d), whole)
        assert _same(a.merge(b).merge(c.merge(d)), whole)
    assert _same(whole.merge(Histogram.empty()), whole)
    assert _same(Histogram.empty().merge(whole), whole)


def test_json_brings_it_back() -> None:
    for histogram in (Histogram.of(_data(3)), Histogram.empty(), Histogram.of(np.zeros(3, np.float32))):
        assert _same(Histogram.from_dict(json.loads(json.dumps(histogram.to_dict()))), histogram)
    with pytest.raises(ValueError, match="8192 counts"):
        Histogram.from_dict({"exponent": 0, "first": 8190, "counts": [1, 2, 3], "low": 0, "high": 1})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        Histogram.of(torch.tensor([1.0, bad]))


def test_minmax() -> None:
    assert activation_range(Histogram.of(torch.tensor([0.5, 2.0])), observer="minmax") == ActivationQParams(
        0.0, 2.0, False, 8
    )
    assert activation_range(Histogram.of(torch.tensor([-0.5, 2.0])), observer="minmax", bits=4) == ActivationQParams(
        -0.5, 2.0, True, 4
    )


def test_percentile_leaves_outliers_out() -> None:
    values = torch.cat([torch.linspace(0, 1, 10_000), torch.tensor([100.0])])
    histogram = Histogram.of(values)
    width = 2.0**histogram.exponent
    found = activation_range(histogram, observer="percentile", percentile=99.9)
    assert found.low == 0.0
    assert 0.998 <= found.high <= 0.999 + width
    assert activation_range(histogram, observer="percentile", percentile=100).high == 100.0
    two_sided = activation_range(Histogram.of(torch.cat([values, -values])), observer="percentile", percentile=99.9)
    assert two_sided.low == -two_sided.high


def test_mse_clips_where_the_error_is_least() -> None:
    values = torch.from_numpy(_data(4, 200_000))
    histogram = Histogram.of(values)

    def error(qparams: ActivationQParams) -> float:
        return float(((fake_quantize(values, qparams) - values) ** 2).mean())

    for bits in (4, 8):
        mse = activation_range(histogram, observer="mse", bits=bits)
        others = [
            ActivationQParams(max(histogram.low, -clip), min(histogram.high, clip), True, bits)
            for clip in np.linspace(0.5, histogram.high, 40).tolist()
        ]
        assert error(mse) <= min(map(error, others)) * 1.01
    # A uniform tensor gains nothing from clipping at 8 bits.
    assert activation_range(Histogram.of(torch.linspace(0, 1, 100_000)), observer="mse").high == 1.0


def test_sigma_is_the_papers_width() -> None:
    values = torch.from_numpy(_data(5, 100_000))
    deviation = float(values.double().std(correction=0))
    for bits, width in ((8, 25), (6, 14), (4, 12)):
        found = activation_range(Histogram.of(values), observer="sigma", bits=bits)
        assert found.high == pytest.approx(width / 2 * deviation, rel=1e-4)
        assert found.low == -found.high
    positive = values.relu()
    found = activation_range(Histogram.of(positive), observer="sigma")
    assert found.high == pytest.approx(25 * float(positive.double().std(correction=0)), rel=1e-3)
    assert found.low == 0.0
    with pytest.raises(ValueError, match="give sigmas"):
        activation_range(Histogram.of(values), observer="sigma", bits=5)
    assert activation_range(Histogram.of(values), observer="sigma", bits=5, sigmas=10).bits == 5


def test_integers_of_a_range() -> None:
    unsigned = ActivationQParams(0.0, 2.55, False, 8)
    assert (unsigned.qmin, unsigned.qmax, unsigned.zero_point) == (0, 255, 0)
    assert unsigned.scale == pytest.approx(0.01)
    signed = ActivationQParams(-1.0, 2.0, True, 4)
    assert (signed.qmin, signed.qmax, signed.zero_point) == (-8, 7, -3)
    assert signed.scale == pytest.approx(0.2)
    assert ActivationQParams(0.0, 0.0, False, 8).scale == 1.0


def test_fake_quantize_rounds_clips_and_keeps_zero() -> None:
    qparams = ActivationQParams(-1.0, 2.0, True, 4)
    x = torch.tensor([0.0, 0.09, 0.11, -5.0, 5.0])
    torch.testing.assert_close(fake_quantize(x, qparams), torch.tensor([0.0, 0.0, 0.2, -1.0, 2.0]))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert fake_quantize(x.to(dtype), qparams).dtype == dtype
    assert torch.equal(fake_quantize(torch.zeros(3), ActivationQParams(0.0, 0.0, False)), torch.zeros(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0.0, "high": 1.0, "signed": False, "bits": 1}, "from 2 to 8"),
        ({"low": 0.5, "high": 1.0, "signed": False}, "hold zero"),
        ({"low": -1.0, "high": math.inf, "signed": True}, "finite"),
        ({"low": -1.0, "high": 1.0, "signed": False}, "unsigned"),
    ],
)
def test_bad_ranges_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationQParams(**settings)


def test_bad_observers_are_refused() -> None:
    histogram = Histogram.of(torch.ones(3))
    with pytest.raises(ValueError, match="empty"):
        activation_range(Histogram.empty(), observer="minmax")
    with pytest.raises(ValueError, match="observer must be"):
        activation_range(histogram, observer="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="percentile"):
        activation_range(histogram, observer="percentile", percentile=20)
    with pytest.raises(ValueError, match="sigmas"):
        activation_range(histogram, observer="sigma", sigmas=-1)


def test_values_of_other_types_are_counted_as_the_float32_that_they_round_to() -> None:
    # Just below 1 in float64, 1 in float32: another bin, another exponent.
    value = np.array([1 - 2.0**-30])
    assert float(value.astype(np.float32)[0]) == 1.0
    assert _same(Histogram.of(value), Histogram.of(np.ones(1, np.float32)))
    assert _same(Histogram.of(torch.from_numpy(value)), Histogram.of(np.ones(1, np.float32)))
