"""What the agent tells: events for logs, and the same as figures in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from storage.agent.signals import Signals

EventKind = Literal["decision", "switch", "fetch", "failure"]


@dataclass(frozen=True)
class AgentEvent:
    """``decision``: the policy's, told when it changes; ``switch``: engines were told a level; ``fetch``: shards came;
    ``failure``: something did not work, the model goes on as it was.
    """

    kind: EventKind
    name: str
    level: int
    version: int
    rule: str
    reason: str
    received_bytes: int = 0
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


@dataclass
class Metrics:
    """Figures since the agent began, and the last look at the machine."""

    levels: dict[str, int] = field(default_factory=dict)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def event(self, event: AgentEvent) -> None:
        """Count an event by its kind, model and rule."""
        self.counts[event.kind, event.name, event.rule] += 1

    def text(self, signals: Signals, received_bytes: int) -> str:
        """Return all figures (Prometheus, text exposition format 0.0.4); a signal that is absent has no line."""
        lines = ["# TYPE nestquant_agent_level gauge"]
        lines += [f'nestquant_agent_level{{model="{name}"}} {level}' for name, level in sorted(self.levels.items())]
        lines.append("# TYPE nestquant_agent_events_total counter")
        for (kind, name, rule), count in sorted(self.counts.items()):
            labels = f'kind="{kind}",model="{name}",rule="{rule}"'
            lines.append(f"nestquant_agent_events_total{{{labels}}} {count}")
        lines += [
            "# TYPE nestquant_agent_received_bytes_total counter",
            f"nestquant_agent_received_bytes_total {received_bytes}",
            "# TYPE nestquant_agent_signal gauge",
        ]
        for name, value in vars(signals).items():
            if isinstance(value, int | float):
                lines.append(f'nestquant_agent_signal{{signal="{name}"}} {float(value):g}')
        return "\n".join(lines) + "\n"

    def write(self, path: Path, signals: Signals, received_bytes: int) -> None:
        """Rename the figures into place, for node_exporter's textfile collector. Raises ``OSError``."""
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(self.text(signals, received_bytes), encoding="ascii")
        temporary.replace(path)
