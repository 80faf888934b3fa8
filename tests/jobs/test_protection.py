"""Small layers get more high bits: which, how many, and never for more than their share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.spec.file import parse_spec
from jobs.spec.job import JobSpec
from jobs.stages.plan import Plan, make_plan, protection_notes
from jobs.stages.protection import SHARE, SHARE_BELOW_4, protected_bits
from nestquant.surgery import LayerScan, LayerSite

Document = Callable[..., dict[str, Any]]


def site(name: str, *shape: int, groups: int = 1) -> LayerSite:
    return LayerSite(name=name, kind="conv2d", parameter="weight", shape=shape, groups=groups)


# A small network with depthwise layers: 432, 144, 512, 288, 2,048 and 64,000 weights.
NETWORK = [
    site("stem", 16, 3, 3, 3),
    site("depthwise", 16, 1, 3, 3, groups=16),
    site("pointwise", 32, 16, 1, 1),
    site("depthwise2", 32, 1, 3, 3, groups=32),
    site("expand", 64, 32, 1, 1),
    site("head", 1000, 64, 1, 1),
]


def planned(**quantize: Any) -> Plan:
    document = {
        "name": "net",
        "model": {"library": "timm", "arch": "x", "random_seed": 0},
        "store": {"uri": "memory://m"},
        "quantize": {"recipe": "data_free", **quantize},
    }
    spec: JobSpec = parse_spec(document, where="test")
    return make_plan(spec, LayerScan(tuple(NETWORK), ()), [one.name for one in NETWORK], {})


def high(plan: Plan) -> dict[str, int]:
    return {layer.name: layer.bits[-1] for layer in plan.layers}


def test_small_layers_get_more_bits_as_far_as_the_share_goes() -> None:
    plan = planned()
    # 67,424 weights at 4 bits, 2% of that: 5,393. Two bits more: stem 864, depthwise 288, depthwise2 576, pointwise
    # 1,024; of the 2,641 that are left one bit for 2,048.
    assert high(plan) == {"stem": 6, "depthwise": 6, "pointwise": 6, "depthwise2": 6, "expand": 5, "head": 4}
    assert plan.protected == ("depthwise", "depthwise2", "expand", "pointwise", "stem")
    assert protection_notes(plan) == (
        "5 of 6 layers are small and get up to 6 high bits: stem, depthwise, pointwise, depthwise2, expand; "
        "4.07 bits on average (quantize.protect: none gives plain widths).",
    )


def test_below_four_bits_the_share_is_larger() -> None:
    assert high(planned(bits=[8, 3])) == {
        "stem": 6, "depthwise": 6, "pointwise": 6, "depthwise2": 6, "expand": 6, "head": 3
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "protected"), [([8, 6, 4], 5), ([8, 5], 6), ([6, 4], 5), ([8, 6], None), ([8, 7], None), ([8], None)]
)
def test_a_protected_layer_stays_below_the_next_finer_width(bits: list[int], protected: int | None) -> None:
    plan = planned(bits=bits)
    assert high(plan)["depthwise"] == (protected or bits[-1])
    assert bool(protection_notes(plan)) == (protected is not None)


def test_what_the_spec_says_of_a_layer_stands() -> None:
    plan = planned(overrides={"depthwise": {"bits": [8, 3]}, "stem": {"scheme": "symmetric"}})
    assert high(plan) == {"stem": 6, "depthwise": 3, "pointwise": 6, "depthwise2": 6, "expand": 5, "head": 4}


@pytest.mark.parametrize(
    "quantize",
    [{"protect": "none"}, {"recipe": "paper"}, {"mixed": {"mean_bits": 4.0}}, {"recipe": "paper", "bits": [8]}],
)
def test_plain_widths_where_they_are_asked_for_or_are_chosen_otherwise(quantize: dict[str, Any]) -> None:
    plan = planned(**quantize)
    assert plan.protected == ()
    assert {layer.bits for layer in plan.layers} == {tuple(quantize.get("bits", (8, 4)))}


layers = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 64), st.sampled_from([1, 3])), min_size=1, max_size=12)


@given(layers, st.sampled_from([(8, 4), (8, 3), (8, 6, 4), (8, 2), (8, 5), (4, 2)]))
def test_no_more_is_spent_than_the_share_and_nothing_that_fits_is_left(
    shapes: list[tuple[int, int, int]], bits: tuple[int, ...]
) -> None:
    sites = [site(f"l{index}", rows, columns, side, side) for index, (rows, columns, side) in enumerate(shapes)]
    weights = {one.name: math.prod(one.shape) for one in sites}
    chosen = protected_bits(sites, {one.name: bits for one in sites})
    spent = sum(weights[name] * (width - bits[-1]) for name, width in chosen.items())
    limit = (SHARE_BELOW_4 if bits[-1] < 4 else SHARE) * bits[-1] * sum(weights.values())
    assert spent <= limit
    assert all(bits[-1] < width < bits[-2] for width in chosen.values())
    most = min(6, bits[-2] - 1)
    assert all(weights[name] > limit - spent for name in weights if chosen.get(name, bits[-1]) < most)


def test_the_key_is_part_of_a_job_only_where_a_recipe_heeds_it(tiny_document: Document) -> None:
    digests = {"source_digest": "sha256:" + "0" * 64, "calibration_digest": "sha256:" + "1" * 64}

    def identity(**quantize: Any) -> str:
        return parse_spec(tiny_document(quantize=quantize), where="test").identity(**digests)

    assert identity(recipe="paper", protect="none") == identity(recipe="paper")
    assert identity(recipe="calibrated", protect="none") != identity(recipe="calibrated")
    mixed = {"recipe": "calibrated", "mixed": {"mean_bits": 4.0}}
    assert identity(**mixed, protect="none") == identity(**mixed)


def test_a_bit_goes_where_it_costs_least_for_what_it_saves() -> None:
    sites = [site("first", 8, 1, 1, 1), site("small", 100, 1, 1, 1), site("middle", 350, 1, 1, 1)]
    # 458 weights of 3 bits, 10% of that: 137. Three bits for the first layer take 24, one for the next smallest 100.
    assert protected_bits(sites, dict.fromkeys(("first", "small", "middle"), (8, 3))) == {"first": 6, "small": 4}
    # With 500 to spend the middle one's first bit (350) comes before the small one's second, which counts four times.
    sites.append(site("large", 1_210, 1, 1, 1))
    widths = dict.fromkeys(("first", "small", "middle", "large"), (8, 3))
    assert protected_bits(sites, widths) == {"first": 6, "small": 4, "middle": 4}
