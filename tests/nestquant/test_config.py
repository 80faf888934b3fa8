from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from nestquant.config import NestConfig, signed_range

ALL_PAIRS = [(full, high) for high, full in combinations(range(1, 9), 2)]


def test_there_are_28_pairs() -> None:
    assert len(ALL_PAIRS) == 28
    for full, high in ALL_PAIRS:
        config = NestConfig((full, high))
        assert (config.full_bits, config.high_bits, config.level_count) == (full, high, 2)
        assert config.level_bits == (high, full - high + 1)
        # What the paper pays: one bit more than the full-bit integer.
        assert sum(config.level_bits) == full + 1


def test_three_levels() -> None:
    config = NestConfig((8, 6, 3))
    assert config.shifts == (3, 2)
    assert config.level_bits == (3, 4, 3)
    assert [config.grid_bits(level) for level in range(3)] == [3, 6, 8]
    with pytest.raises(IndexError, match="0 to 2"):
        config.grid_bits(3)


def test_one_level_is_plain_quantization() -> None:
    config = NestConfig((8,))
    assert (config.shifts, config.level_bits, config.high_bits) == ((), (8,), 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": ()}, "tuple"),
        ({"bits": [8, 4]}, "tuple"),
        ({"bits": (4, 8)}, "descend"),
        ({"bits": (8, 8)}, "descend"),
        ({"bits": (9, 4)}, "from 1 to 8"),
        ({"bits": (8, 0)}, "from 1 to 8"),
        ({"bits": (8, 4.0)}, "from 1 to 8"),
        ({"bits": (8, True)}, "from 1 to 8"),
        ({"scheme": "affine"}, "asymmetric"),
        ({"rounding": "floor"}, "adaptive"),
        ({"range": "part"}, "nested"),
        ({"bits": (1,), "scheme": "symmetric"}, "at least 2 full bits"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NestConfig(**settings)


def test_signed_range() -> None:
    assert [signed_range(bits) for bits in (1, 2, 8)] == [(-1, 0), (-2, 1), (-128, 127)]
