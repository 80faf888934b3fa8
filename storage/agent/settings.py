"""What the agent's file says: the models, where they come from, and the policy's limits."""

from __future__ import annotations

from datetime import time
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from storage.manifest import ModelName

MIB = 1 << 20
Bytes = Annotated[int, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Section(BaseModel):
    """Unknown keys are refused: a limit that is spelled wrong would be no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _window(text: str) -> str:
    begin, end = parse_window(text)
    if begin == end:
        raise ValueError("begins when it ends; write 00:00-23:59 for a whole day")
    return text


def parse_window(text: str) -> tuple[time, time]:
    """Return begin and end of ``22:00-06:00``. Raises ``ValueError``."""
    begin, _, end = text.partition("-")
    try:
        return time.fromisoformat(begin), time.fromisoformat(end)
    except ValueError:
        raise ValueError("expected HH:MM-HH:MM of the device's local time") from None


def in_window(text: str, at: time) -> bool:
    """Tell whether a time of day is in a window, which may run over midnight; its end is outside."""
    begin, end = parse_window(text)
    return begin <= at < end if begin < end else at >= begin or at < end


Window = Annotated[str, AfterValidator(_window)]


class MemoryLimits(Section):
    """``keep_bytes``: with less than this available the model drops to part-bit. It rises where ``rise_factor`` times
    the bytes of all its shards are available beyond that: old and new weights stand side by side during a switch.
    """

    keep_bytes: Bytes = 64 * MIB
    rise_factor: float = Field(default=3.0, ge=0)


class PressureLimits(Section):
    """Share of time, in percent over 10 s, in which some task waits for memory (PSI). Drop above, rise below."""

    drop_percent: Percent = 5.0
    rise_percent: Percent = 1.0


class BatteryLimits(Section):
    """Charge in percent, while no mains feed the device. Drop at or below, rise at or above."""

    drop_percent: Percent = 20.0
    rise_percent: Percent = 40.0


class TemperatureLimits(Section):
    """Degrees Celsius of the hottest thermal zone. Drop at or above, rise at or below."""

    drop_celsius: float = 85.0
    rise_celsius: float = 70.0


class DiskLimits(Section):
    """``keep_bytes``: with less than this free where the models lie, low shards are deleted. They are fetched where
    twice that stays free beside them.
    """

    keep_bytes: Bytes = 128 * MIB


class NetworkLimits(Section):
    """``metered``: true, false, or the windows in which the network costs money: then no low shard travels.

    ``bytes_a_day``: low shards of all models may move so many bytes a day (UTC), started once the whole fits.
    ``max_rate``: bytes a second.
    """

    metered: bool | tuple[Window, ...] = False
    bytes_a_day: Bytes | None = None
    max_rate: int | None = Field(default=None, ge=1)


class Policy(Section):
    """When a model runs full-bit.

    ``dwell_s``: at most one switch in this time, whatever happens. ``calm_s``: nothing spoke against full-bit for so
    long before a rise; twice as long after each rise that was taken back within ``10 * calm_s``, 64 times at most.
    ``full_bit``: the windows in which a model may rise; empty for always.
    """

    dwell_s: float = Field(default=30.0, gt=0)
    calm_s: float = Field(default=300.0, ge=0)
    full_bit: tuple[Window, ...] = ()
    memory: MemoryLimits = MemoryLimits()
    pressure: PressureLimits = PressureLimits()
    battery: BatteryLimits = BatteryLimits()
    temperature: TemperatureLimits = TemperatureLimits()
    disk: DiskLimits = DiskLimits()
    network: NetworkLimits = NetworkLimits()

    @model_validator(mode="after")
    def _thresholds_leave_a_gap(self) -> Policy:
        pressure, battery, temperature = self.pressure, self.battery, self.temperature
        gaps = [
            ("pressure", pressure.rise_percent < pressure.drop_percent, "rise_percent below drop_percent"),
            ("battery", battery.rise_percent > battery.drop_percent, "rise_percent above drop_percent"),
            ("temperature", temperature.rise_celsius < temperature.drop_celsius, "rise_celsius below drop_celsius"),
        ]
        for section, right, expected in gaps:
            if not right:
                raise ValueError(f"{section}: expected {expected}, or the model would go to and fro")
        return self


class ModelSettings(Section):
    """A model that the agent looks after. ``ref`` is what is pulled where the device has no version of it."""

    name: ModelName
    ref: str = "latest"


class AgentSettings(Section):
    """The agent's file.

    ``state``: the agent's own folder; ``<state>/<name>/current`` is what engines follow. ``cgroup``: the engine's,
    below the cgroup mount; the agent's own by default. ``interval_s``: between two looks at the signals.
    """

    store: str
    cache: Path
    state: Path
    models: tuple[ModelSettings, ...] = Field(min_length=1)
    cgroup: str | None = None
    interval_s: float = Field(default=5.0, gt=0)
    trust: Path | None = None
    allow_unsigned: bool = False
    policy: Policy = Policy()

    @model_validator(mode="after")
    def _names_stand_once(self) -> AgentSettings:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: {name} stands twice; keep one")
        return self
