"""Signals read from a machine that is laid out below a folder, and from this one."""

from __future__ import annotations

import os
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.agent.signals import Sensors, Signals
from tests.storage.agent.machine import set_celsius, set_memory, set_power, write

NOON = datetime(2026, 11, 27, 12, 0)
CGROUP = "sys/fs/cgroup"


def test_an_empty_machine_has_no_signals(tmp_path: Path) -> None:
    assert Sensors(tmp_path).look(NOON) == Signals(local=NOON)


def test_what_the_files_say(tmp_path: Path) -> None:
    set_memory(tmp_path, 1000, pressure=7.25)
    set_power(tmp_path, charge=63, mains=False)
    set_celsius(tmp_path, 41.5)
    write(tmp_path, "sys/class/thermal/thermal_zone1/temp", "-274000\n")  # a sensor that is not there
    write(tmp_path, "sys/class/thermal/cooling_device0/temp", "99000\n")
    write(tmp_path, "sys/class/power_supply/mouse/type", "Battery\n")
    write(tmp_path, "sys/class/power_supply/mouse/scope", "Device\n")
    write(tmp_path, "sys/class/power_supply/mouse/capacity", "2\n")
    assert Sensors(tmp_path, metered=False).look(NOON) == Signals(
        memory_bytes=1_024_000,
        pressure_percent=7.25,
        battery_percent=63.0,
        mains=False,
        celsius=41.5,
        metered=False,
        local=NOON,
    )


@pytest.mark.parametrize(
    ("status", "online", "mains"),
    [("Discharging", None, False), ("Full", None, True), ("Discharging", 1, True), ("Charging", 0, False)],
)
def test_what_feeds_the_machine(tmp_path: Path, status: str, online: int | None, mains: bool) -> None:
    write(tmp_path, "sys/class/power_supply/BAT0/type", "Battery\n")
    write(tmp_path, "sys/class/power_supply/BAT0/status", f"{status}\n")
    if online is not None:
        write(tmp_path, "sys/class/power_supply/usb/type", "USB\n")
        write(tmp_path, "sys/class/power_supply/usb/online", f"{online}\n")
    seen = Sensors(tmp_path).look(NOON)
    assert (seen.mains, seen.battery_percent) == (mains, None)


def test_the_tightest_cgroup_above_the_engine_counts(tmp_path: Path) -> None:
    set_memory(tmp_path, 8_000_000, pressure=1.0)
    write(tmp_path, f"{CGROUP}/cgroup.controllers", "memory\n")
    for path, limit, usage in (("a", "1000000", 400_000), ("a/b", "max", 300_000), ("a/b/c", "9000000", 200_000)):
        write(tmp_path, f"{CGROUP}/{path}/memory.max", f"{limit}\n")
        write(tmp_path, f"{CGROUP}/{path}/memory.current", f"{usage}\n")
    write(tmp_path, f"{CGROUP}/a/memory.stat", "anon 5\ninactive_file 50000\n")
    write(tmp_path, f"{CGROUP}/a/b/c/memory.pressure", "some avg10=30.00 avg60=0.00 avg300=0.00 total=9\n")
    write(tmp_path, "proc/self/cgroup", "4:memory:/x\n0::/a/b\n")
    engine = Sensors(tmp_path, cgroup="/a/b/c").look(NOON)
    assert (engine.memory_bytes, engine.pressure_percent) == (650_000, 30.0)
    own = Sensors(tmp_path).look(NOON)  # no memory.pressure there: the machine's
    assert (own.memory_bytes, own.pressure_percent) == (650_000, 1.0)
    write(tmp_path, f"{CGROUP}/a/b/c/memory.high", "300000\n")
    assert Sensors(tmp_path, cgroup="a/b/c").look(NOON).memory_bytes == 100_000


def test_version_2_beside_version_1_is_where_systemd_mounts_it(tmp_path: Path) -> None:
    write(tmp_path, f"{CGROUP}/unified/cgroup.controllers", "memory\n")
    write(tmp_path, f"{CGROUP}/unified/a/memory.max", "1000\n")
    write(tmp_path, f"{CGROUP}/unified/a/memory.current", "1400\n")
    assert Sensors(tmp_path, cgroup="a").look(NOON).memory_bytes == 0


def test_metered_windows_and_a_disk(tmp_path: Path) -> None:
    windows = ("08:00-12:00", "23:00-01:00")
    seen = [
        Sensors(tmp_path, metered=windows).look(NOON.replace(hour=hour, minute=minute)).metered
        for hour, minute in ((7, 59), (8, 0), (11, 59), (12, 0), (23, 30), (0, 59), (1, 0))
    ]
    assert seen == [False, True, True, False, True, True, False]
    status = os.statvfs(tmp_path)
    free = Sensors(tmp_path, disk=tmp_path).look(NOON).disk_bytes
    assert free is not None
    assert abs(free - status.f_bavail * status.f_frsize) < 1 << 30
    assert Sensors(tmp_path, disk=tmp_path / "none").look(NOON).disk_bytes is None


def test_this_machine_has_memory() -> None:
    seen = Sensors().look(NOON).memory_bytes
    assert seen is not None
    assert seen > 1 << 20


SOURCES = (
    "proc/meminfo",
    "proc/pressure/memory",
    "proc/self/cgroup",
    f"{CGROUP}/cgroup.controllers",
    f"{CGROUP}/a/memory.max",
    f"{CGROUP}/a/memory.current",
    f"{CGROUP}/a/memory.stat",
    "sys/class/power_supply/BAT0/type",
    "sys/class/power_supply/BAT0/capacity",
    "sys/class/power_supply/BAT0/status",
    "sys/class/power_supply/AC/online",
    "sys/class/thermal/thermal_zone0/temp",
)
WORDS = b"MemAvailable:|some|avg10=|nan|inf|1e400|-1|0::/a|Battery|\xff|\x00|=|max|42|inactive_file 7| |\n|kB".split(
    b"|"
)
PIECES = st.sampled_from([*WORDS, b"9" * 5000])


@given(st.dictionaries(st.sampled_from(SOURCES), st.lists(PIECES, max_size=8).map(b"".join), max_size=12))
def test_whatever_stands_in_the_files_a_signal_is_sensible_or_absent(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("root")
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    seen = Sensors(root, cgroup="a").look(NOON)
    assert seen.memory_bytes is None or seen.memory_bytes >= 0
    for share in (seen.pressure_percent, seen.battery_percent):
        assert share is None or 0 <= share <= 100
    assert seen.celsius is None or -60 <= seen.celsius <= 200


def test_folders_in_the_place_of_files_are_absent(tmp_path: Path) -> None:
    for name in SOURCES:
        (tmp_path / name).mkdir(parents=True)
    seen = Sensors(tmp_path, cgroup="a").look(NOON)
    assert {field.name for field in fields(Signals) if getattr(seen, field.name) is not None} == {"local"}
