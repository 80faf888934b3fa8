"""The loop on a laid-out machine, with a real store, a real device folder, and a clock that the test moves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from storage.agent.agent import Agent
from storage.agent.current import Current, read_current
from storage.agent.events import AgentEvent
from storage.agent.settings import AgentSettings
from storage.device import Device
from storage.stores.local import LocalStore
from tests.faults.conftest import small_disk  # noqa: F401
from tests.faults.disks import fill
from tests.jobs.conftest import Run, nestquant  # noqa: F401
from tests.storage.agent.machine import set_celsius, set_memory, set_power
from tests.storage.device.artifacts import publish

PLENTY_KIB = 4_000_000


@dataclass
class Bench:
    """A machine, its agent, and what engines and logs were told."""

    folder: Path
    state: Path
    changes: dict[str, Any] = field(default_factory=dict)
    now_s: float = 1000.0
    currents: list[Current] = field(default_factory=list)
    events: list[AgentEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.folder / "machine"
        set_memory(self.root, PLENTY_KIB)
        self.document = {
            "store": str(self.folder / "store"),
            "cache": str(self.folder / "cache"),
            "state": str(self.state),
            "models": [{"name": "net"}],
            "allow_unsigned": True,
            "policy": {"disk": {"keep_bytes": 0}, **self.changes},
        }
        self.agent = self.start()

    def start(self, on_current: Callable[[Current], None] | None = None) -> Agent:
        self.agent = Agent(
            AgentSettings.model_validate(self.document),
            root=self.root,
            on_event=self.events.append,
            on_current=on_current or self.currents.append,
            clock=lambda: self.now_s,
        )
        return self.agent

    def tick(self, wait_s: float = 0.0) -> None:
        """Move the clock, look, and wait for what is fetched."""
        self.now_s += wait_s
        self.agent.tick()
        for model in self.agent._models:
            if model.fetch is not None:
                model.fetch.exception(timeout=30)

    @property
    def level(self) -> int:
        current = read_current(self.state / "net")
        assert current is not None
        assert all(Path(file).exists() for file in current.files.values())
        return current.level

    def full_bit(self) -> None:
        """Go from nothing to full-bit."""
        for wait_s in (0, 1, 300, 1):
            self.tick(wait_s)
        assert self.level == 1


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    publish(LocalStore(tmp_path / "store"))
    return Bench(tmp_path, tmp_path / "state")


def test_from_nothing_to_full_bit_and_back_before_the_memory_is_gone(bench: Bench) -> None:
    bench.tick()  # absent: pulled
    bench.tick(1)
    assert bench.level == 0
    bench.tick(299)
    assert Device(bench.folder / "cache").levels("net") == (0,)
    bench.tick(1)  # calm for 300 s: the low shards come
    assert bench.level == 0
    bench.tick(1)
    assert bench.level == 1
    set_memory(bench.root, PLENTY_KIB, pressure=20.0)
    bench.tick(1)
    assert bench.level == 1  # the dwell time
    shutil.rmtree(bench.folder / "store")  # a drop needs no network
    bench.tick(30)
    assert bench.level == 0
    assert Device(bench.folder / "cache").levels("net") == (0, 1)
    set_memory(bench.root, PLENTY_KIB)
    bench.tick(1)
    bench.tick(600)  # nor does the way back; it waits twice as long, as the rise did not last
    assert bench.level == 1
    assert [current.level for current in bench.currents] == [0, 1, 0, 1]
    assert [(event.kind, event.rule) for event in bench.events if event.kind == "switch"] == [
        ("switch", rule) for rule in ("version", "calm", "pressure", "calm")
    ]
    text = (bench.state / "metrics.prom").read_text()
    assert 'nestquant_agent_level{model="net"} 1\n' in text
    assert 'nestquant_agent_events_total{kind="switch",model="net",rule="pressure"} 1\n' in text
    assert "celsius" not in text


def test_a_day_of_battery_heat_and_a_metered_network(bench: Bench) -> None:
    bench.document["policy"]["network"] = {"metered": True}
    bench.start()
    set_power(bench.root, charge=90, mains=False)
    for wait_s in (0, 1, 400, 400):
        bench.tick(wait_s)
    assert Device(bench.folder / "cache").levels("net") == (0,)
    assert bench.events[-1].reason == "stay: metered: no low shard travels"
    bench.document["policy"]["network"] = {"metered": False}
    bench.agent.close()
    bench.start()
    for wait_s in (1, 300, 1):
        bench.tick(wait_s)
    assert bench.level == 1
    for act in (
        lambda: set_power(bench.root, charge=15, mains=False),
        lambda: set_celsius(bench.root, 90),
        lambda: set_power(bench.root, charge=15, mains=True),
    ):
        act()
        bench.tick(4000)
        assert bench.level == 0
    set_celsius(bench.root, 50)
    bench.tick(1)
    bench.tick(600)
    assert bench.level == 1


def test_a_budget_that_is_spent_outlives_a_restart(tmp_path: Path) -> None:
    manifest, _ = publish(LocalStore(tmp_path / "store"))
    low = sum(group.levels[1].size_bytes for group in manifest.groups)
    bench = Bench(tmp_path, tmp_path / "state", {"network": {"bytes_a_day": low}})
    for wait_s in (0, 1, 300, 300):
        bench.tick(wait_s)
    assert bench.level == 0  # the pull of part-bit counts, too
    bench.agent.close()
    bench.start()
    bench.tick(300)
    assert "of today's budget remain" in bench.events[-1].reason


def test_a_store_that_is_away_is_asked_again_and_the_model_goes_on(bench: Bench) -> None:
    bench.tick()
    bench.tick(1)
    (bench.folder / "store").rename(bench.folder / "away")
    for wait_s in (300, 1, 10, 10, 60, 1):
        bench.tick(wait_s)
    failures = [event.reason for event in bench.events if event.kind == "failure"]
    assert [reason.rpartition("; ")[2] for reason in failures] == ["again in 60 s", "again in 120 s"]
    assert bench.level == 0
    (bench.folder / "away").rename(bench.folder / "store")
    bench.tick(120)
    bench.tick(1)
    assert bench.level == 1


def test_a_restart_keeps_level_and_dwell_time(bench: Bench) -> None:
    bench.full_bit()
    bench.start()  # the first one is not closed: it was killed
    set_memory(bench.root, 1000)
    bench.tick(29)
    assert bench.level == 1
    bench.tick(1)
    assert bench.level == 0


def test_a_callback_that_fails_is_called_again_and_stops_nothing(bench: Bench) -> None:
    calls: list[int] = []

    def engine(current: Current) -> None:
        calls.append(current.level)
        if len(calls) < 3:
            raise RuntimeError("no engine yet")

    bench.start(engine)
    for _ in range(5):
        bench.tick(1)
    # Pulled by the first look, told by the second; a failed call is tried at once, and at each look.
    assert calls == [0, 0, 0]
    assert [event.reason for event in bench.events if event.rule == "callback"] == ["RuntimeError: no engine yet"] * 2


def test_low_shards_that_a_person_deletes_end_full_bit(bench: Bench) -> None:
    bench.full_bit()
    Device(bench.folder / "cache").downgrade("net")
    bench.now_s += 30
    bench.agent.tick()
    assert (bench.level, bench.currents[-1].level) == (0, 0)


def test_a_dry_run_changes_nothing(bench: Bench) -> None:
    bench.full_bit()
    before = {path: path.read_bytes() for path in bench.folder.rglob("*") if path.is_file()}
    dry = Agent(
        AgentSettings.model_validate(bench.document),
        root=bench.root,
        dry_run=True,
        clock=lambda: bench.now_s + 60,
    )
    set_memory(bench.root, 1000)
    assert dry.tick()["net"].action == "drop"
    dry.close()
    after = {path: path.read_bytes() for path in bench.folder.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} == {bench.root / "proc/meminfo"}


def test_a_drop_on_a_full_disk(tmp_path: Path, small_disk: Path) -> None:  # noqa: F811
    publish(LocalStore(tmp_path / "store"))
    bench = Bench(tmp_path, small_disk / "state")
    bench.full_bit()
    fill(small_disk)
    set_memory(bench.root, 1000)
    bench.tick(30)
    assert bench.level == 0
    assert bench.currents[-1].level == 0


def test_a_disk_that_gets_full_costs_the_low_shards(bench: Bench) -> None:
    bench.full_bit()
    bench.document["policy"]["disk"] = {"keep_bytes": 1 << 60}
    bench.agent.close()
    bench.start()
    bench.tick(30)
    assert bench.level == 0
    bench.tick(1)
    assert Device(bench.folder / "cache").levels("net") == (0,)


def test_the_command_explains_acts_once_and_refuses_a_wrong_file(bench: Bench, nestquant: Run) -> None:  # noqa: F811
    file = bench.folder / "agent.json"
    bench.document["policy"] = {"calm_s": 0, "disk": {"keep_bytes": 0}}
    file.write_text(json.dumps(bench.document))
    words = ("agent", file, "--root", bench.root)
    assert nestquant(*words, "--explain")[1] == "No model of the file is on this device yet.\n"
    code, out, _ = nestquant(*words, "--once", "--json")
    assert code == 0
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["decision", "fetch", "switch", "decision"]
    assert nestquant(*words, "--once")[0] == 0
    assert bench.level == 1
    out = nestquant(*words, "--explain")[1]
    assert out.splitlines()[0] == "net: stay, level 1, decided by shards: what runs is here whole"
    assert "  pressure     rise  tasks wait for memory 0% of the time" in out.splitlines()
    assert json.loads(nestquant(*words, "--explain", "--json")[1])["net"]["action"] == "stay"
    file.write_text(json.dumps(bench.document | {"polic": 1}))
    code, _, err = nestquant(*words)
    assert (code, "unknown key 'polic'" in err) == (2, True)
