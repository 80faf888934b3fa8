"""Gates: what falls short is named with its key; what is just allowed passes."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.spec.job import EvaluateSpec
from jobs.stages.evaluation import gate_fault
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
