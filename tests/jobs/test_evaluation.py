"""Ranges of images, and gates: what falls short is named with its key; what is just allowed passes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.spec.job import EvaluateSpec
from jobs.stages.evaluation import gate_fault, image_ranges
from workers.measure import Measured


def measured(level: int | None, correct: int, *, activations: bool = False) -> Measured:
    return Measured(
        mode="",
        level=level,
        activations=activations,
        correct=correct,
        total=1000,
        skipped=(),
        resident_bytes=0,
        seconds=0,
    )


MODES = (measured(None, 683), measured(0, 653), measured(1, 670), measured(2, 682))


@pytest.mark.parametrize(
    ("gate", "fault"),
    [
        ({"max_part_drop": 3.0}, None),
        ({"max_part_drop": 2.9}, "part-bit top-1 lies 3.00 points below float, evaluate.max_part_drop allows 2.9"),
        ({"max_drop": 0.1}, None),
        ({"max_drop": 0.09}, "full-bit top-1 lies 0.10 points below float, evaluate.max_drop allows 0.09"),
        ({"min_part_top1": 65.3}, None),
        ({"min_part_top1": 65.4}, "part-bit top-1 is 65.30%, evaluate.min_part_top1 asks for 65.4%"),
        ({"max_drop": 5, "max_part_drop": 1}, "part-bit top-1 lies 3.00 points below float"),
        ({}, None),
    ],
)
def test_a_gate_names_what_falls_short(gate: dict[str, Any], fault: str | None) -> None:
    spec = EvaluateSpec(data="images", **gate)
    assert spec.has_gate == bool(gate)
    found = gate_fault(spec, MODES)
    assert found == fault if fault is None else found is not None and found.startswith(fault)


def test_with_quantized_activations_theirs_is_the_accuracy_that_counts() -> None:
    modes = (*MODES, measured(0, 633, activations=True), measured(2, 683, activations=True))
    assert gate_fault(EvaluateSpec(data="images", max_part_drop=4.99), modes) == (
        "part-bit top-1 lies 5.00 points below float, evaluate.max_part_drop allows 4.99"
    )
    assert gate_fault(EvaluateSpec(data="images", max_drop=0), modes) is None


@given(count=st.integers(1, 60_000), side=st.integers(1, 2000), batch_size=st.integers(1, 5000))
def test_ranges_are_whole_batches_and_hold_every_image_once(count: int, side: int, batch_size: int) -> None:
    ranges = image_ranges(count, pixels=side * side, batch_size=batch_size)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == count
    assert all(start < stop and start % batch_size == 0 for start, stop in ranges)


def test_a_range_is_as_long_as_its_images_are_small() -> None:
    assert len(image_ranges(50_000, pixels=224 * 224, batch_size=50)) == 200
    assert image_ranges(10_000, pixels=32 * 32, batch_size=256)[0] == (0, 2048)
    assert image_ranges(100, pixels=2000 * 2000, batch_size=30)[:2] == [(0, 30), (30, 60)]
