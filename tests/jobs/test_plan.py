"""The plan tiles every layer exactly, keeps shards within their size, and never depends on how tasks are cut."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import PlanError
from jobs.spec.file import parse_spec
from jobs.spec.job import JobSpec
from jobs.stages.plan import Plan, make_plan
from nestquant.surgery import LayerScan, LayerSite
from workers.tasks import GroupTask


def spec(**quantize: object) -> JobSpec:
    return parse_spec(
        {
            "name": "m",
            "model": {"library": "timm", "arch": "x", "random_seed": 0},
            "store": {"uri": "memory://m", "shard_bytes": 4096},
            "quantize": {"recipe": "paper", **quantize},
        },
        where="test",
    )


def site(name: str, *shape: int, groups: int = 1, kind: str = "conv2d") -> LayerSite:
    return LayerSite(name=name, kind=kind, parameter="weight", shape=shape, groups=groups)  # type: ignore[arg-type]


def plan(sites: list[LayerSite], job: JobSpec | None = None, kept: tuple[tuple[str, str], ...] = ()) -> Plan:
    state = {f"{one.name}.weight": (one.shape, 4 * math.prod(one.shape)) for one in sites}
    state |= {f"{one.name}.bias": ((one.shape[0],), 4 * one.shape[0]) for one in sites}
    return make_plan(job or spec(), LayerScan(tuple(sites), kept), [one.name for one in sites], state)


shapes = st.tuples(st.integers(1, 300), st.integers(1, 64), st.sampled_from([1, 3]), st.sampled_from([1, 3]))


@given(st.lists(shapes, min_size=1, max_size=12), st.sampled_from([(8, 4), (8, 6, 4), (6, 4), (8, 7), (8,)]))
def test_pieces_tile_every_layer_and_groups_keep_their_size(
    chosen: list[tuple[int, int, int, int]], bits: tuple[int, ...]
) -> None:
    sites = [site(f"l{index}", *shape) for index, shape in enumerate(chosen)]
    made = plan(sites, spec(bits=bits))
    for layer, one in zip(made.layers, sites, strict=True):
        assert layer.pieces[0].start == 0
        assert layer.pieces[-1].stop == one.shape[0]
        assert all(left.stop == right.start for left, right in pairwise(layer.pieces))
    widest = max(bits[-1], *(high - low + 1 for high, low in pairwise(bits)), 0)
    for group in made.groups:
        size = sum(-(-piece.weights * widest // 8) for piece in group.pieces)
        single_row = len(group.pieces) == 1 and group.pieces[0].stop - group.pieces[0].start == 1
        assert size <= 4096 or single_row
    assert [group.index for group in made.groups] == list(range(len(made.groups)))
    assert sum(piece.weights for group in made.groups for piece in group.pieces) == made.weights


def test_layers_stand_in_execution_order_whatever_their_registration() -> None:
    sites = [site("b", 8, 8, 1, 1), site("a", 8, 8, 1, 1), site("never", 8, 8, 1, 1)]
    made = make_plan(spec(), LayerScan(tuple(sites), ()), ["a", "b"], {})
    assert [layer.name for layer in made.layers] == ["a", "b", "never"]


def test_ignored_layers_are_listed_and_stay_in_the_base() -> None:
    made = plan(
        [site("stem", 8, 3, 3, 3), site("head", 10, 8, 1, 1)], spec(ignore=["stem*"]), kept=(("pos", "no layer"),)
    )
    assert [layer.name for layer in made.layers] == ["head"]
    assert [(kept.name, kept.reason) for kept in made.kept_float] == [
        ("pos", "no layer"),
        ("stem", "ignored by the spec (stem*)"),
    ]
    assert "stem.weight" in made.base[0].parameters
    assert "head.weight" not in made.base[0].parameters


def test_overrides_apply_in_order_and_the_later_wins() -> None:
    job = spec(overrides={"*": {"bits": [8, 6]}, "head": {"bits": [8, 7], "scheme": "symmetric"}})
    made = plan([site("stem", 8, 3, 3, 3), site("head", 10, 8, 1, 1)], job)
    assert [(layer.bits, layer.scheme) for layer in made.layers] == [((8, 6), "asymmetric"), ((8, 7), "symmetric")]


def test_a_pattern_that_matches_nothing_names_the_nearest_layer() -> None:
    with pytest.raises(
        PlanError, match=r"quantize.ignore: 'steem' matches none of the 1 layers. Did you mean 'stem'\?"
    ):
        plan([site("stem", 8, 3, 3, 3)], spec(ignore=["steem"]))


def test_nothing_left_to_quantize_is_said() -> None:
    with pytest.raises(PlanError, match=r"Nothing to quantize in x: 1 layers stay float \(stem\)"):
        plan([site("stem", 8, 3, 3, 3)], spec(ignore=["*"]))


def test_a_transposed_convolution_is_cut_by_its_output_channels() -> None:
    made = plan([site("up", 6, 5, 3, 3, groups=2, kind="conv_transpose2d")])
    (piece,) = made.groups[0].pieces
    assert (piece.start, piece.stop, piece.weights) == (0, 10, 270)


@given(st.integers(1, 10_000_000))
def test_the_size_of_tasks_changes_no_shard(task_weights: int) -> None:
    sites = [site(f"l{index}", 64, 32, 3, 3) for index in range(6)]
    job = spec()
    cut = job.model_copy(update={"cluster": job.cluster.model_copy(update={"task_weights": task_weights})})
    made = plan(sites, cut)
    assert made.groups == plan(sites).groups
    assert [unit for task in made.tasks for unit in task] == [*made.groups, *made.base]


def test_small_layers_share_a_task_and_a_huge_one_is_split() -> None:
    small = plan([site(f"l{index}", 8, 8, 1, 1) for index in range(50)])
    assert len(small.tasks) == 1
    job = spec()
    fine = job.model_copy(update={"cluster": job.cluster.model_copy(update={"task_weights": 50_000})})
    huge = plan([site("huge", 1000, 512, 1, 1, kind="conv2d")], fine)
    weights = [
        sum(p.weights for unit in task if isinstance(unit, GroupTask) for p in unit.pieces) for task in huge.tasks
    ]
    assert sum(weights) == 512_000
    assert len(huge.tasks) == 10
    assert max(weights) <= 60_000
