"""A machine's /proc and /sys, laid out below a folder."""

from __future__ import annotations

from pathlib import Path


def write(root: Path, name: str, text: str) -> None:
    """Write one file below the root."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def set_memory(root: Path, available_kib: int, *, pressure: float = 0.0) -> None:
    """Say how much memory the machine has, and how long tasks wait for it."""
    write(root, "proc/meminfo", f"MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable:   {available_kib} kB\n")
    some = f"some avg10={pressure:.2f} avg60=0.00 avg300=0.00 total=1\n"
    write(root, "proc/pressure/memory", some + "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")


def set_power(root: Path, *, charge: int, mains: bool) -> None:
    """Say what feeds the machine."""
    supplies = "sys/class/power_supply"
    write(root, f"{supplies}/AC/type", "Mains\n")
    write(root, f"{supplies}/AC/online", f"{int(mains)}\n")
    write(root, f"{supplies}/BAT0/type", "Battery\n")
    write(root, f"{supplies}/BAT0/capacity", f"{charge}\n")
    write(root, f"{supplies}/BAT0/status", "Charging\n" if mains else "Discharging\n")


def set_celsius(root: Path, degrees: float) -> None:
    """Say how hot the machine is."""
    write(root, "sys/class/thermal/thermal_zone0/temp", f"{int(degrees * 1000)}\n")
