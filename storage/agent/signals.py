"""What the machine says of itself, read below a root folder. What cannot be read is None: absent is not zero.

Sources: ``/proc/meminfo`` (proc(5)), cgroup v2 and PSI (kernel: Documentation/admin-guide/cgroup-v2.rst and
accounting/psi.rst), ``/sys/class/power_supply`` and ``/sys/class/thermal`` (Documentation/ABI/testing).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from storage.agent.settings import in_window

_MAX_BYTES = 1 << 16  # of one file of /proc or /sys
_SENSIBLE_CELSIUS = (-60.0, 200.0)  # beyond lies what a sensor says that is not there


@dataclass(frozen=True)
class Signals:
    """One look at the machine.

    ``memory_bytes``: available without swapping or being killed, the least of the machine and all cgroups above the
    engine. ``pressure_percent``: time in which some task waited for memory. ``mains``: whether the device is fed.
    ``celsius``: of the hottest zone. ``disk_bytes``: free for us. ``metered``: whether the network costs money.
    ``local``: the wall clock, in local time.
    """

    memory_bytes: int | None = None
    pressure_percent: float | None = None
    battery_percent: float | None = None
    mains: bool | None = None
    celsius: float | None = None
    disk_bytes: int | None = None
    metered: bool | None = None
    local: datetime | None = None


@dataclass(frozen=True)
class Sensors:
    """Where signals are read: below ``root``; ``cgroup`` is the engine's, None for this process's own.

    ``disk`` is the folder whose file system counts; ``metered`` what the settings say of the network.
    """

    root: Path = Path("/")
    cgroup: str | None = None
    disk: Path | None = None
    metered: bool | tuple[str, ...] | None = None

    def look(self, local: datetime) -> Signals:
        """Read every signal once. Whatever a source holds, this raises nothing."""
        folders = list(self._cgroup_folders())
        rooms = [room for folder in folders if (room := _room(folder)) is not None]
        available = _meminfo_available(self.root / "proc/meminfo")
        memory = [*rooms, *([] if available is None else [available])]
        sources = [*(folder / "memory.pressure" for folder in folders[:1]), self.root / "proc/pressure/memory"]
        pressures = [value for path in sources if (value := _some_avg10(path)) is not None]
        battery, mains = _power(self.root / "sys/class/power_supply")
        return Signals(
            memory_bytes=min(memory, default=None),
            pressure_percent=next(iter(pressures), None),
            battery_percent=battery,
            mains=mains,
            celsius=_hottest(self.root / "sys/class/thermal"),
            disk_bytes=_free(self.disk),
            metered=self._is_metered(local),
            local=local,
        )

    def _cgroup_folders(self) -> Iterator[Path]:
        """Yield the engine's cgroup and those above it, innermost first; nothing where cgroup v2 is not mounted."""
        mounts = (self.root / "sys/fs/cgroup", self.root / "sys/fs/cgroup/unified")  # the second: beside version 1
        mount = next((one for one in mounts if (one / "cgroup.controllers").exists()), None)
        if mount is None:
            return
        path = self.cgroup if self.cgroup is not None else self._own_cgroup()
        parts = [part for part in (path or "").split("/") if part not in ("", ".", "..")]
        for length in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:length])

    def _own_cgroup(self) -> str | None:
        for line in _lines(self.root / "proc/self/cgroup"):
            if line.startswith("0::"):  # cgroups(7): version 2 is hierarchy 0 and names no controllers
                return line[3:]
        return None

    def _is_metered(self, local: datetime) -> bool | None:
        if self.metered is None or isinstance(self.metered, bool):
            return self.metered
        return any(in_window(window, local.time()) for window in self.metered)


def _room(folder: Path) -> int | None:
    """Return the bytes that a cgroup may still take; page cache that nobody touched lately counts as free."""
    limits = [limit for name in ("memory.max", "memory.high") if (limit := _number(folder / name)) is not None]
    usage = _number(folder / "memory.current")
    if not limits or usage is None:  # "max": no limit
        return None
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if len(line.split()) == 2)
    inactive = _as_int(stat.get("inactive_file", "")) or 0
    return max(0, min(limits) - usage + min(inactive, usage))


def _meminfo_available(path: Path) -> int | None:
    for line in _lines(path):
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            words = amount.split()
            count = _as_int(words[0]) if words else None
            return None if count is None or count < 0 else count * 1024
    return None


def _some_avg10(path: Path) -> float | None:
    for line in _lines(path):
        kind, *figures = line.split()
        if kind == "some":
            values = dict(figure.partition("=")[::2] for figure in figures)
            share = _as_float(values.get("avg10", ""))
            return share if share is not None and 0 <= share <= 100 else None
    return None


def _power(folder: Path) -> tuple[float | None, bool | None]:
    """Return the charge of the emptiest battery that feeds the device, and whether something else feeds it."""
    charges, discharging, online = [], [], []
    for supply in _folders(folder):
        kind, scope = _text(supply / "type"), _text(supply / "scope")
        if scope == "Device":  # the battery of a mouse
            continue
        if kind == "Battery":
            charge = _as_float(_text(supply / "capacity") or "")
            if charge is not None and 0 <= charge <= 100:
                charges.append(charge)
            if status := _text(supply / "status"):
                discharging.append(status == "Discharging")
        elif (state := _number(supply / "online")) is not None:  # 2: a programmable supply that is on
            online.append(state > 0)
    mains = any(online) if online else not any(discharging) if discharging else None
    return min(charges, default=None), mains


def _hottest(folder: Path) -> float | None:
    zones = (_number(zone / "temp") for zone in _folders(folder) if zone.name.startswith("thermal_zone"))
    least, most = _SENSIBLE_CELSIUS
    return max((c for zone in zones if zone is not None and least <= (c := zone / 1000) <= most), default=None)


def _free(folder: Path | None) -> int | None:
    if folder is None:
        return None
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str | None:
    """Return a small file's text, None where it cannot be read (drivers answer EIO, ENODEV, EAGAIN)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        return os.read(descriptor, _MAX_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _lines(path: Path) -> list[str]:
    return [line for line in (_text(path) or "").splitlines() if line.strip()]


def _number(path: Path) -> int | None:
    return _as_int(_text(path) or "")


def _as_int(text: str) -> int | None:
    try:
        return int(text) if len(text) <= 20 else None
    except ValueError:
        return None


def _as_float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
