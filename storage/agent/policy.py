"""From signals to a decision: pure functions, so that any history can be tried.

Each rule looks at one signal and takes one of three stances: *drop* to part-bit, *hold* what runs, or *rise* (nothing
speaks against full-bit). One drop wins over all, one hold over every rise. Limits to drop and to rise lie apart, a rise
waits for a calm time, and between two switches there is the dwell time: ADR 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from storage.agent.settings import Policy, in_window
from storage.agent.signals import Signals
from storage.wording import size

Stance = Literal["drop", "hold", "rise"]
Action = Literal["stay", "drop", "rise", "fetch", "shed"]
MOST_BACKOFF = 6  # doublings of the calm time


@dataclass(frozen=True)
class Situation:
    """What the device has of a model. ``level`` runs, ``top`` is full-bit; ``top_bytes``: all shards of full-bit.

    ``absent_bytes``: of these, what is not here. ``low_bytes``: above part-bit, on the disk. ``budget_bytes``: what
    may move today, None for any.
    """

    level: int
    top: int
    top_bytes: int
    absent_bytes: int = 0
    low_bytes: int = 0
    budget_bytes: int | None = None


@dataclass(frozen=True)
class Past:
    """What a decision remembers of those before it; seconds of one clock that never goes back.

    ``switch_s``, ``rise_s``: of the last switch and rise. ``calm_since_s``: since when nothing spoke against full-bit.
    ``backoff``: how often the calm time is doubled.
    """

    switch_s: float | None = None
    rise_s: float | None = None
    calm_since_s: float | None = None
    backoff: int = 0


@dataclass(frozen=True)
class Verdict:
    """What one rule says, and why."""

    rule: str
    stance: Stance
    reason: str


@dataclass(frozen=True)
class Decision:
    """``fetch``: bring the low shards, then decide again; ``shed``: delete them. ``rule`` decided, by ``reason``."""

    action: Action
    level: int
    rule: str
    reason: str
    verdicts: tuple[Verdict, ...]
    past: Past


def decide(policy: Policy, past: Past, signals: Signals, situation: Situation, now_s: float) -> Decision:
    """Decide for one model.

    Args:
        policy: the limits.
        past: what the last decision returned, ``Past()`` for the first.
        signals: one look at the machine.
        situation: the level that runs and what is on the disk.
        now_s: seconds of the clock of ``past``.
    """
    verdicts = tuple(rule(policy, signals, situation) for rule in RULES)
    strongest = min(verdicts, key=lambda verdict: ("drop", "hold", "rise").index(verdict.stance))
    calm = strongest.stance == "rise"
    past = replace(past, calm_since_s=(now_s if past.calm_since_s is None else past.calm_since_s) if calm else None)
    if past.backoff and past.rise_s is not None and _lasted(policy, past, now_s) and situation.level == situation.top:
        past = replace(past, backoff=0)
    stays = Decision("stay", situation.level, strongest.rule, strongest.reason, verdicts, past)
    if strongest.stance == "hold" or situation.level == (0 if strongest.stance == "drop" else situation.top):
        shed = strongest.stance == "drop" and strongest.rule == "disk" and situation.low_bytes > 0
        return replace(stays, action="shed") if shed else stays
    if past.switch_s is not None and now_s - past.switch_s < policy.dwell_s:
        reason = f"{strongest.rule} says {strongest.stance} ({strongest.reason}); the last switch was too recent"
        rest_s = past.switch_s + policy.dwell_s - now_s
        return replace(stays, rule="dwell", reason=f"{reason}, {rest_s:.0f} s to wait")
    if strongest.stance == "drop":
        rash = situation.level == situation.top and past.rise_s is not None and not _lasted(policy, past, now_s)
        backoff = min(past.backoff + 1, MOST_BACKOFF) if rash else past.backoff
        dropped = replace(past, switch_s=now_s, calm_since_s=None, backoff=backoff)
        return replace(stays, action="drop", level=0, past=dropped)
    calm_s = policy.calm_s * 2**past.backoff
    if past.calm_since_s is not None and (rest_s := past.calm_since_s + calm_s - now_s) > 0:
        return replace(stays, rule="calm", reason=f"nothing speaks against full-bit, {rest_s:.0f} s to wait")
    if situation.absent_bytes:
        return replace(
            stays, action="fetch", rule="calm", reason=f"{size(situation.absent_bytes)} of low shards to come"
        )
    risen = replace(past, switch_s=now_s, rise_s=now_s)
    return replace(
        stays, action="rise", level=situation.top, rule="calm", reason="nothing speaks against full-bit", past=risen
    )


def _lasted(policy: Policy, past: Past, now_s: float) -> bool:
    return past.rise_s is not None and now_s - past.rise_s >= 10 * policy.calm_s


def _shards(_: Policy, __: Signals, situation: Situation) -> Verdict:
    if situation.level and situation.absent_bytes:
        return Verdict("shards", "drop", f"{size(situation.absent_bytes)} of full-bit's shards are gone from the disk")
    return Verdict("shards", "rise", "what runs is here whole")


def _pressure(policy: Policy, signals: Signals, _: Situation) -> Verdict:
    share, limits = signals.pressure_percent, policy.pressure
    if share is None:
        return Verdict("pressure", "rise", "absent")
    text = f"tasks wait for memory {share:g}% of the time"
    if share >= limits.drop_percent:
        return Verdict("pressure", "drop", f"{text}, {limits.drop_percent:g}% or more")
    if share > limits.rise_percent:
        return Verdict("pressure", "hold", f"{text}, more than {limits.rise_percent:g}%")
    return Verdict("pressure", "rise", text)


def _memory(policy: Policy, signals: Signals, situation: Situation) -> Verdict:
    room, limits = signals.memory_bytes, policy.memory
    if room is None:  # a rise takes memory: nobody knows whether it is there
        return Verdict("memory", "hold", "absent")
    text = f"{size(room)} available"
    if room < limits.keep_bytes:
        return Verdict("memory", "drop", f"{text}, less than {size(limits.keep_bytes)}")
    need = limits.keep_bytes + int(limits.rise_factor * situation.top_bytes)
    if situation.level < situation.top and room < need:
        return Verdict("memory", "hold", f"{text}, {size(need)} needed for a rise")
    return Verdict("memory", "rise", text)


def _temperature(policy: Policy, signals: Signals, _: Situation) -> Verdict:
    celsius, limits = signals.celsius, policy.temperature
    if celsius is None:
        return Verdict("temperature", "rise", "absent")
    if celsius >= limits.drop_celsius:
        return Verdict("temperature", "drop", f"{celsius:g} °C, {limits.drop_celsius:g} or more")
    if celsius > limits.rise_celsius:
        return Verdict("temperature", "hold", f"{celsius:g} °C, more than {limits.rise_celsius:g}")
    return Verdict("temperature", "rise", f"{celsius:g} °C")


def _battery(policy: Policy, signals: Signals, _: Situation) -> Verdict:
    charge, limits = signals.battery_percent, policy.battery
    if signals.mains:
        return Verdict("battery", "rise", "on mains")
    if charge is None:
        return Verdict("battery", "rise", "absent")
    text = f"{charge:g}% charge"
    if charge <= limits.drop_percent:
        return Verdict("battery", "drop", f"{text}, {limits.drop_percent:g}% or less")
    if charge < limits.rise_percent:
        return Verdict("battery", "hold", f"{text}, less than {limits.rise_percent:g}%")
    return Verdict("battery", "rise", text)


def _disk(policy: Policy, signals: Signals, situation: Situation) -> Verdict:
    free, keep = signals.disk_bytes, policy.disk.keep_bytes
    if free is None:
        return Verdict("disk", "rise", "absent")
    text = f"{size(free)} free"
    # Where nothing of full-bit is on the disk, a drop would free nothing.
    if free < keep and situation.low_bytes:
        return Verdict("disk", "drop", f"{text}, less than {size(keep)}")
    need = 2 * keep + situation.absent_bytes
    if situation.absent_bytes and free < need:
        return Verdict("disk", "hold", f"{text}, {size(need)} needed to fetch")
    return Verdict("disk", "rise", text)


def _hours(policy: Policy, signals: Signals, _: Situation) -> Verdict:
    if not policy.full_bit or signals.local is None:
        return Verdict("hours", "rise", "no windows" if not policy.full_bit else "absent")
    clock = f"{signals.local:%H:%M}"
    if any(in_window(window, signals.local.time()) for window in policy.full_bit):
        return Verdict("hours", "rise", f"{clock} is in a window")
    return Verdict("hours", "drop", f"{clock} is outside of {', '.join(policy.full_bit)}")


def _network(_: Policy, signals: Signals, situation: Situation) -> Verdict:
    if not situation.absent_bytes:
        return Verdict("network", "rise", "nothing to fetch")
    if signals.metered:
        return Verdict("network", "hold", "metered: no low shard travels")
    budget = situation.budget_bytes
    if budget is not None and situation.absent_bytes > budget:
        text = f"{size(situation.absent_bytes)} to fetch, {size(budget)} of today's budget remain"
        return Verdict("network", "hold", text)
    return Verdict("network", "rise", "absent" if signals.metered is None else "not metered")


RULES: tuple[Callable[[Policy, Signals, Situation], Verdict], ...] = (
    _shards,
    _pressure,
    _memory,
    _temperature,
    _battery,
    _disk,
    _hours,
    _network,
)
