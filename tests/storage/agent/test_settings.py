"""The agent's file: what is refused, in words that name the key."""

from __future__ import annotations

from datetime import time

import pytest
from pydantic import ValidationError

from storage.agent.settings import AgentSettings, Policy, in_window

FILE = {"store": "s3://models", "cache": "/var/lib/models", "state": "/var/lib/agent", "models": [{"name": "net"}]}


def test_four_keys_are_enough_and_the_rest_has_defaults() -> None:
    settings = AgentSettings.model_validate(FILE)
    assert settings.models[0].ref == "latest"
    assert (settings.policy, settings.interval_s) == (Policy(), 5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"memory": {"keep": 1}}}, "policy.memory.keep\n  Extra inputs"),
        ({"policy": {"battery": {"drop_percent": 50}}}, "battery: expected rise_percent above drop_percent"),
        ({"policy": {"pressure": {"rise_percent": 5}}}, "pressure: expected rise_percent below drop_percent"),
        ({"policy": {"temperature": {"rise_celsius": 90}}}, "temperature: expected rise_celsius below drop_celsius"),
        ({"policy": {"full_bit": ["8 to 9"]}}, "expected HH:MM-HH:MM"),
        ({"policy": {"full_bit": ["08:00-08:00"]}}, "begins when it ends"),
        ({"policy": {"dwell_s": 0}}, "greater than 0"),
        ({"models": []}, "at least 1 item"),
        ({"models": [{"name": "net"}, {"name": "net"}]}, "models: net stands twice"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AgentSettings.model_validate(FILE | change)


def test_windows_run_over_midnight() -> None:
    inside = [hour for hour in range(24) if in_window("22:00-06:00", time(hour))]
    assert inside == [0, 1, 2, 3, 4, 5, 22, 23]
