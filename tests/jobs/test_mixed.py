"""High bits by integer programming: as good as trying everything, bounds kept exactly, ties to one choice."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import PlanError, SpecError
from jobs.spec.file import parse_spec
from jobs.spec.job import JobSpec
from jobs.spec.quantize import MixedSpec
from jobs.stages.mixed import UNITS, LayerChoices, choose_bits, points_per_nat
from jobs.stages.plan import make_plan
from nestquant.surgery import LayerScan, LayerSite
from workers.sensitivity import Damage, SensitivityRecord

WIDTHS = (3, 4, 5, 6)


@st.composite
def networks(draw: st.DrawFn) -> list[LayerChoices]:
    layers = []
    for index in range(draw(st.integers(1, 5))):
        widths = draw(st.sets(st.sampled_from(WIDTHS), min_size=1).map(lambda found: tuple(sorted(found))))
        weights = draw(st.integers(1, 5000))
        # Few values: ties are the hard part.
        damage = draw(st.lists(st.sampled_from([0.0, 0.001, 0.002, 0.5]), min_size=len(widths), max_size=len(widths)))
        sizes = tuple(-(-weights * width // 8) for width in widths)
        layers.append(LayerChoices(f"l{index}", weights, widths, tuple(damage), sizes))
    return layers


def best(layers: list[LayerChoices], target: MixedSpec, rate: float) -> tuple[int, ...] | None:
    """Try every choice: the first in the order that the program promises."""
    total = sum(layer.weights for layer in layers)
    found = []
    for choice in itertools.product(*(range(len(layer.high_bits)) for layer in layers)):
        damage = sum(round(UNITS * layer.divergences[at]) for layer, at in zip(layers, choice, strict=True))
        size = sum(layer.level_bytes[at] for layer, at in zip(layers, choice, strict=True))
        bits = sum(layer.weights * layer.high_bits[at] for layer, at in zip(layers, choice, strict=True))
        if target.mean_bits is not None and bits <= Fraction(str(target.mean_bits)) * total:
            found.append((damage, bits, choice))
        if target.target_bytes is not None and size <= target.target_bytes:
            found.append((damage, size, choice))
        if target.max_drop is not None and damage * rate <= UNITS * target.max_drop:
            found.append((size, damage, choice))
    if not found:
        return None
    return tuple(layers[index].high_bits[at] for index, at in enumerate(min(found)[2]))


targets = st.one_of(
    st.sampled_from([3.0, 3.3, 4.0, 4.7, 6.0]).map(lambda bits: MixedSpec(mean_bits=bits)),
    st.integers(1, 15_000).map(lambda size: MixedSpec(target_bytes=size)),
    st.sampled_from([0.01, 0.05, 1.0, 20.0]).map(lambda drop: MixedSpec(max_drop=drop)),
)


@settings(deadline=None)  # the solver's library is loaded in the first
@given(networks(), targets)
def test_no_choice_is_better(layers: list[LayerChoices], target: MixedSpec) -> None:
    expected = best(layers, target, 16.0)
    if expected is None:
        with pytest.raises(PlanError, match="cannot be met: the smallest possible here is"):
            choose_bits(layers, target, points_per_nat=16.0)
        return
    chosen = choose_bits(layers, target, points_per_nat=16.0)
    assert tuple(chosen.high_bits.values()) == expected
    assert list(chosen.high_bits) == [layer.name for layer in layers]


def test_the_mean_is_kept_to_the_last_weight() -> None:
    layers = [
        LayerChoices("wide", 1_000_003, (3, 4), (1.0, 0.0), (375_002, 500_002)),
        LayerChoices("thin", 999_999, (3, 4), (0.5, 0.0), (375_000, 500_000)),
        LayerChoices("thinner", 3, (3, 4), (0.1, 0.0), (2, 2)),
    ]
    # Half of all weights at 4 bits and half at 3 would be 3.5: 'wide' alone is one weight too many.
    chosen = choose_bits(layers, MixedSpec(mean_bits=3.5), points_per_nat=1.0)
    assert chosen.high_bits == {"wide": 3, "thin": 4, "thinner": 4}
    assert chosen.mean_bits == (3 * 1_000_003 + 4 * 1_000_002) / 2_000_005


def test_a_target_that_cannot_be_met_names_the_smallest() -> None:
    layers = [LayerChoices("a", 100, (3, 4), (0.5, 0.25), (38, 50)), LayerChoices("b", 300, (8,), (0.0,), (300,))]
    for target, told in (
        (MixedSpec(mean_bits=6.0), r"quantize\.mixed\.mean_bits: 6 cannot be met: .* is 6\.7500\. .* allow narrower"),
        (MixedSpec(target_bytes=400), r"target_bytes: 400 cannot be met: .* is 438 bytes\."),
        (MixedSpec(max_drop=3.0), r"max_drop: 3 cannot be met: .* is 5\.00 points predicted\. .* allow wider"),
    ):
        with pytest.raises(PlanError, match=told):
            choose_bits(layers, target, points_per_nat=20.0, fixed_bytes=100)


def damage(divergence: float, lost: float) -> Damage:
    return Damage(
        bits=(8, 4), divergence=divergence, same=0, lost=lost, correct=None, sqnr_db=(), flips=(), shard_bytes=0
    )


def test_points_for_a_nat_leave_collapsed_layers_out() -> None:
    def record(*damages: Damage) -> SensitivityRecord:
        return SensitivityRecord(layer="a", images=1, noise=False, float_correct=None, damages=damages, skipped=())

    measured = [record(damage(0.25, 0.05), damage(5.0, 0.9)), record(damage(0.75, 0.15))]
    assert points_per_nat(measured) == 100 * (0.05 + 0.15) / 1.0
    assert points_per_nat([record(damage(5.0, 0.9))]) == 18.0
    assert points_per_nat([record(damage(0.0, 0.0))]) == 0.0


def spec(**quantize: object) -> JobSpec:
    return parse_spec(
        {
            "name": "m",
            "model": {"library": "timm", "arch": "x", "random_seed": 0},
            "store": {"uri": "memory://m"},
            "quantize": {"recipe": "paper", **quantize},
        },
        where="test",
    )


@pytest.mark.parametrize(
    ("quantize", "told"),
    [
        ({"mixed": {}}, r"give exactly one of 'mean_bits', 'target_bytes' and 'max_drop'"),
        ({"mixed": {"mean_bits": 4, "max_drop": 1}}, "give exactly one of"),
        ({"mixed": {"max_drop": 1}}, r"quantize\.mixed\.max_drop needs 'calibration"),
        ({"bits": [8], "mixed": {"mean_bits": 4}}, r"bits are \[8\]"),
        ({"bits": [8, 6, 4], "mixed": {"mean_bits": 4, "choices": [4, 6]}}, r"expected widths from 1 to 5, below"),
        ({"mixed": {"mean_bit": 4}}, r"unknown key 'quantize\.mixed\.mean_bit'\. Did you mean 'mean_bits'\?"),
    ],
)
def test_a_wrong_section_is_refused(quantize: dict[str, object], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        spec(**quantize)


def test_choices_stay_below_the_next_finer_width() -> None:
    assert spec(mixed={"mean_bits": 4}).quantize.high_choices == (3, 4, 5, 6)
    assert spec(bits=[8, 5, 3], mixed={"mean_bits": 4}).quantize.high_choices == (3, 4)
    assert spec(bits=[6, 4], mixed={"mean_bits": 4, "choices": [5, 2, 5]}).quantize.high_choices == (2, 5)


def test_chosen_bits_take_the_coarsest_place_and_an_override_wins() -> None:
    job = spec(bits=[8, 6, 4], mixed={"mean_bits": 4}, overrides={"head": {"bits": [8, 7]}})
    sites = tuple(
        LayerSite(name=name, kind="conv2d", parameter="weight", shape=(8, 8, 1, 1)) for name in ("stem", "body", "head")
    )
    state = {f"{one.name}.weight": (one.shape, 4 * math.prod(one.shape)) for one in sites}
    made = make_plan(
        job, LayerScan(sites, ()), ["stem", "body", "head"], state, high_bits={"stem": 5, "body": 3, "head": 3}
    )
    assert [layer.bits for layer in made.layers] == [(8, 6, 5), (8, 6, 3), (8, 7)]
