from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nestquant.observers import Histogram, activation_range

VALUES = hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def _state(histogram: Histogram) -> str:
    return json.dumps(histogram.to_dict())


@given(VALUES, st.lists(st.integers(0, 60), max_size=5), st.randoms(use_true_random=False))
def test_any_split_in_any_order_gives_the_same_state(values: np.ndarray, cuts: list[int], random: object) -> None:
    parts = [Histogram.of(part) for part in np.split(values, sorted(min(cut, len(values)) for cut in cuts))]
    random.shuffle(parts)  # type: ignore[attr-defined]
    while len(parts) > 1:
        a, b = parts.pop(), parts.pop(random.randrange(len(parts)))  # type: ignore[attr-defined]
        parts.append(a.merge(b))
    assert _state(parts[0]) == _state(Histogram.of(values))
    assert parts[0].count == len(values)
    assert _state(Histogram.from_dict(json.loads(_state(parts[0])))) == _state(parts[0])


@given(VALUES.filter(len), st.sampled_from(["minmax", "percentile", "mse", "sigma"]), st.sampled_from([4, 6, 8]))
def test_every_range_is_usable(values: np.ndarray, observer: str, bits: int) -> None:
    found = activation_range(Histogram.of(values), observer=observer, bits=bits)  # type: ignore[arg-type]
    assert found.low <= 0 <= found.high
    assert found.signed == bool(values.min() < 0)
    assert found.scale > 0
    assert found.qmin <= found.zero_point <= found.qmax
    if observer != "sigma":
        assert min(values.min(), 0) <= found.low
        assert found.high <= max(values.max(), 0)
