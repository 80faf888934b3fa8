"""The policy under any history of signals."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.agent.policy import Action, Decision, Past, Situation, decide
from storage.agent.settings import Policy
from storage.agent.signals import Signals

MB = 1_000_000
NOON = datetime(2026, 11, 27, 12, 0)
CALM = Signals(
    memory_bytes=2000 * MB,
    pressure_percent=0.0,
    battery_percent=90.0,
    mains=False,
    celsius=40.0,
    disk_bytes=9000 * MB,
    metered=False,
    local=NOON,
)
HERE = Situation(level=0, top=1, top_bytes=20 * MB, low_bytes=10 * MB)
FULL = replace(HERE, level=1)
LONG_CALM = Past(switch_s=0.0, rise_s=0.0, calm_since_s=0.0)
LATER = 1e6


def decision(signals: Signals, situation: Situation = HERE, past: Past = LONG_CALM, now_s: float = LATER) -> Decision:
    return decide(Policy(), past, signals, situation, now_s)


signals_of_any_kind = st.builds(
    Signals,
    memory_bytes=st.none() | st.integers(0, 4000 * MB),
    pressure_percent=st.none() | st.floats(0, 100),
    battery_percent=st.none() | st.floats(0, 100),
    mains=st.none() | st.booleans(),
    celsius=st.none() | st.floats(-40, 120),
    disk_bytes=st.none() | st.integers(0, 1000 * MB),
    metered=st.none() | st.booleans(),
    local=st.none() | st.datetimes(),
)
policies = st.builds(
    Policy,
    dwell_s=st.floats(0.1, 100),
    calm_s=st.floats(0, 100),
    full_bit=st.just(()) | st.just(("22:00-06:00",)),
)
steps = st.tuples(
    st.floats(0, 60), signals_of_any_kind | st.just(CALM), st.booleans(), st.none() | st.integers(0, 30 * MB)
)


@given(policies, st.lists(steps, min_size=1, max_size=60))
def test_at_most_one_switch_a_dwell_time_under_any_history(
    policy: Policy, history: list[tuple[float, Signals, bool, int | None]]
) -> None:
    past, situation, now_s = Past(), replace(HERE, absent_bytes=10 * MB, low_bytes=0), 0.0
    switches: list[float] = []
    for wait_s, signals, shards_here, budget in history:
        now_s += wait_s
        situation = replace(
            situation,
            absent_bytes=0 if shards_here else 10 * MB,
            low_bytes=10 * MB if shards_here else 0,
            budget_bytes=budget,
        )
        made = decide(policy, past, signals, situation, now_s)
        past = made.past
        if made.action in ("drop", "rise"):
            assert made.level == (0 if made.action == "drop" else 1) != situation.level
            assert made.action == "drop" or not situation.absent_bytes
            switches.append(now_s)
            situation = replace(situation, level=made.level)
        else:
            assert made.level == situation.level
        if made.action == "fetch":
            assert situation.absent_bytes
            assert not signals.metered
            assert budget is None or situation.absent_bytes <= budget
    assert all(later - earlier >= policy.dwell_s for earlier, later in pairwise(switches))


@given(signals_of_any_kind, st.sampled_from([field.name for field in fields(Signals)]), st.sampled_from([HERE, FULL]))
def test_an_absent_signal_never_makes_a_model_drop(signals: Signals, name: str, situation: Situation) -> None:
    blind = replace(signals, **{name: None})
    drops = {verdict.rule for verdict in decision(signals, situation).verdicts if verdict.stance == "drop"}
    # Without word of mains a battery counts as what feeds the device.
    battery = {"battery"} if name == "mains" else set()
    assert {
        verdict.rule for verdict in decision(blind, situation).verdicts if verdict.stance == "drop"
    } <= drops | battery


def test_where_nothing_is_to_be_read_nothing_changes() -> None:
    for situation in (HERE, FULL):
        made = decision(Signals(), situation)
        assert (made.action, made.level, made.rule, made.reason) == ("stay", situation.level, "memory", "absent")


SQUEEZES = [
    ({"pressure_percent": 5.0}, "pressure", "tasks wait for memory 5% of the time, 5% or more"),
    ({"memory_bytes": 60 * MB}, "memory", "60.00 MB available, less than 67.11 MB"),
    ({"celsius": 85.0}, "temperature", "85 °C, 85 or more"),
    ({"battery_percent": 20.0}, "battery", "20% charge, 20% or less"),
    ({"disk_bytes": 100 * MB}, "disk", "100.00 MB free, less than 134.22 MB"),
]


@pytest.mark.parametrize(("change", "rule", "reason"), SQUEEZES)
def test_each_squeeze_drops_a_full_bit_model_at_once_and_says_why(
    change: dict[str, float], rule: str, reason: str
) -> None:
    made = decision(replace(CALM, **change), FULL)  # type: ignore[arg-type]
    assert (made.action, made.level, made.rule, made.reason) == ("drop", 0, rule, reason)
    assert made.past.switch_s == LATER


@pytest.mark.parametrize(
    "change", [{"pressure_percent": 3.0}, {"celsius": 75.0}, {"battery_percent": 30.0}, {"memory_bytes": 100 * MB}]
)
def test_between_the_limits_what_runs_goes_on(change: dict[str, float]) -> None:
    signals = replace(CALM, **change)  # type: ignore[arg-type]
    part, full = decision(signals), decision(signals, FULL)
    assert (part.action, part.level) == ("stay", 0)
    assert (full.action, full.level) == ("stay", 1)


def test_mains_outweigh_an_empty_battery() -> None:
    assert decision(replace(CALM, battery_percent=1.0, mains=True), FULL).action == "stay"
    assert decision(replace(CALM, battery_percent=1.0, mains=None), FULL).action == "drop"


def test_a_rise_waits_for_calm_and_fetches_first() -> None:
    absent = replace(HERE, absent_bytes=10 * MB, low_bytes=0)
    first = decision(CALM, absent, Past(), 100.0)
    assert (first.action, first.rule, first.past.calm_since_s) == ("stay", "calm", 100.0)
    assert decision(CALM, absent, first.past, 399.9).action == "stay"
    assert decision(CALM, absent, first.past, 400.0).action == "fetch"
    risen = decision(CALM, HERE, first.past, 400.0)
    assert (risen.action, risen.level, risen.past.switch_s) == ("rise", 1, 400.0)
    hot = replace(CALM, celsius=75.0)
    assert decision(hot, absent, first.past, 400.0).past.calm_since_s is None


@pytest.mark.parametrize(
    ("signals", "budget", "action"),
    [
        (CALM, None, "fetch"),
        (CALM, 10 * MB, "fetch"),
        (CALM, 10 * MB - 1, "stay"),
        (replace(CALM, metered=True), None, "stay"),
        (replace(CALM, metered=None), None, "fetch"),
        (replace(CALM, disk_bytes=278 * MB), None, "stay"),
    ],
)
def test_low_shards_travel_only_where_network_budget_and_disk_allow(
    signals: Signals, budget: int | None, action: Action
) -> None:
    absent = replace(HERE, absent_bytes=10 * MB, low_bytes=0, budget_bytes=budget)
    assert decision(signals, absent).action == action


def test_shards_that_are_here_need_no_network_for_a_rise() -> None:
    assert decision(replace(CALM, metered=True), replace(HERE, budget_bytes=0)).action == "rise"


def test_a_full_disk_deletes_low_shards_once_part_bit_runs() -> None:
    tight = replace(CALM, disk_bytes=MB)
    assert decision(tight, FULL).action == "drop"
    assert decision(tight, HERE).action == "shed"
    assert decision(tight, replace(HERE, low_bytes=0, absent_bytes=10 * MB)).action == "stay"


def test_a_model_whose_low_shards_went_away_drops() -> None:
    made = decision(CALM, replace(FULL, absent_bytes=10 * MB, low_bytes=0))
    assert (made.action, made.rule) == ("drop", "shards")


def test_outside_its_hours_a_model_runs_part_bit() -> None:
    policy = Policy(full_bit=("22:00-06:00",))
    for hour, action in ((21, "drop"), (22, "stay"), (3, "stay"), (6, "drop")):
        signals = replace(CALM, local=NOON.replace(hour=hour))
        assert decide(policy, LONG_CALM, signals, FULL, LATER).action == action


def test_a_rise_that_does_not_last_waits_twice_as_long_each_time_until_one_lasts() -> None:
    policy, past, now_s = Policy(), Past(calm_since_s=0.0), 300.0
    waits = []
    for _ in range(8):
        begin = now_s
        while (made := decide(policy, past, CALM, HERE, now_s)).action != "rise":
            past, now_s = made.past, now_s + 50
        waits.append(now_s - begin)
        made = decide(policy, made.past, replace(CALM, pressure_percent=50.0), FULL, now_s + 50)
        assert made.action == "drop"
        past, now_s = made.past, now_s + 50
    assert waits == [0, *(300 * 2**k for k in range(1, 7)), 300 * 64]
    while (made := decide(policy, past, CALM, HERE, now_s)).action != "rise":
        past, now_s = made.past, now_s + 50
    assert decide(policy, made.past, CALM, FULL, now_s + 3000).past.backoff == 0


def test_every_rule_is_explained_once() -> None:
    verdicts = decision(CALM).verdicts
    assert [(verdict.rule, verdict.stance) for verdict in verdicts] == [
        (rule, "rise")
        for rule in ("shards", "pressure", "memory", "temperature", "battery", "disk", "hours", "network")
    ]
